// An Express proxy with fetch in front of one Express process per org, started when it is first asked for.
const { spawn } = require('child_process');
const path = require('path');
const express = require('express');

const workers = new Map();
const children = [];

function start(org) {
  const child = spawn(process.execPath, [path.join(__dirname, 'express_worker.js'), org]);
  children.push(child);
  return new Promise((resolve) => child.stdout.once('data', (data) => resolve(Number(data))));
}

const app = express();
app.disable('x-powered-by');
app.use(express.raw({ type: () => true }));
app.all('/plugins/echo/:org/*', async (request, response) => {
  const { org } = request.params;
  if (!workers.has(org)) workers.set(org, start(org));
  const port = await workers.get(org);
  const answer = await fetch(`http://127.0.0.1:${port}/${request.params[0]}`, {
    method: request.method,
    headers: { 'content-type': request.get('content-type') || 'application/octet-stream' },
    body: request.body,
  });
  response.status(answer.status).type(answer.headers.get('content-type') || '');
  response.send(Buffer.from(await answer.arrayBuffer()));
});
const server = app.listen(0, '127.0.0.1', () => console.log(server.address().port));
process.on('SIGTERM', () => {
  for (const child of children) child.kill('SIGKILL');
  process.exit(0);
});
