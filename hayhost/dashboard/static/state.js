// What all pages know of the host, and how they ask to be drawn again.

export const host = {
  version: "", mode: "", store: false, open: false, org: null, workers: {}, plugins: {}, problems: [], connection: "", failed: "", seen: false,
};

let draw = () => {};
export const onRedraw = (callback) => (draw = callback);
export const redraw = () => draw();

// Something that is asked for and shown when it is there: {value, error, load()}. A newer answer is never overwritten
// by an older one.
export function resource(ask) {
  let turn = 0;
  const self = {value: null, error: null, async load() {
    const mine = ++turn;
    try {
      const value = await ask();
      if (mine === turn) (self.value = value), (self.error = null);
    } catch (error) {
      if (mine === turn) self.error = error;
    }
    redraw();
  }};
  self.load();
  return self;
}

// Call `work` at most once in `pause` milliseconds, and at last once after the last call.
export function calmly(work, pause = 400) {
  let timer = null;
  let again = false;
  return function calm() {
    if (timer) return void (again = true);
    again = false;
    timer = setTimeout(() => {
      timer = null;
      if (again) calm();
    }, pause);
    work();
  };
}
