"""Send a signed event to a running host, as Stripe would: ``python3 send_webhook.py [--tamper] [URL]``."""

import argparse
import json
import os
import time
import urllib.error
import urllib.request

from stripe_signature import sign


def main() -> None:
    """Sign an event, post it and print the answer."""
    parser = argparse.ArgumentParser(description="Send a signed Stripe event to a running host.")
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000/plugins/stripe/acme/webhook")
    parser.add_argument("--tamper", action="store_true", help="change the body after it was signed")
    options = parser.parse_args()
    # In the environment rather than an argument: other users of a machine can read its argument lists.
    secret = os.environ.get("STRIPE_WEBHOOK_SECRET", "whsec_example")
    event = {"id": f"evt_{time.time_ns()}", "type": "charge.succeeded", "data": {"object": {"amount": 1250}}}
    body = json.dumps(event).encode()
    headers = {"Stripe-Signature": sign(body, secret, int(time.time())), "Content-Type": "application/json"}
    if options.tamper:
        body = body.replace(b"1250", b"9950")
    try:
        with urllib.request.urlopen(urllib.request.Request(options.url, body, headers), timeout=30) as answer:
            print(answer.status, answer.read().decode())
    except urllib.error.HTTPError as error:
        print(error.code, error.read().decode())


if __name__ == "__main__":
    main()
