"""What a model can do with the org's Stripe account: an MCP server that lives in the worker."""

import json
from collections.abc import Callable
from typing import Any

from stripe_api import StripeApi

MAX_CHARGES = 100


class StripeTools:
    """Any object with ``list_tools`` and ``call_tool`` is an MCP server. These two block, so they run on threads."""

    def __init__(self, api: StripeApi) -> None:
        self._api = api
        self._tools: dict[str, Callable[[dict[str, Any]], Any]] = {
            "get_customer": self._get_customer,
            "list_charges": self._list_charges,
            "create_refund": self._create_refund,
        }

    def list_tools(self) -> list[dict[str, Any]]:
        """The tools, with JSON Schemas of their arguments."""
        customer = {"type": "string", "description": "A customer's id: cus_…"}
        return [
            _tool("get_customer", "Look up a customer by id.", {"customer": customer}, ["customer"]),
            _tool(
                "list_charges",
                "List the latest charges, newest first.",
                {"customer": customer, "limit": {"type": "integer", "minimum": 1, "maximum": MAX_CHARGES}},
                [],
            ),
            _tool(
                "create_refund",
                "Refund a charge, fully or in part.",
                {
                    "charge": {"type": "string", "description": "A charge's id: ch_…"},
                    "amount": {
                        "type": "integer",
                        "minimum": 1,
                        "description": "In the currency's smallest unit, such as cents; everything if left out",
                    },
                },
                ["charge"],
            ),
        ]

    def call_tool(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run a tool; the result has the shape of MCP's ``tools/call``. An error reaches the model as its message."""
        tool = self._tools.get(name)
        if tool is None:
            raise ValueError(f"there is no tool {name!r}")
        return {"content": [{"type": "text", "text": json.dumps(tool(arguments))}]}

    def _get_customer(self, arguments: dict[str, Any]) -> Any:
        return self._api.customer(_text(arguments, "customer"))

    def _list_charges(self, arguments: dict[str, Any]) -> Any:
        customer = _text(arguments, "customer") if "customer" in arguments else None
        return self._api.charges(customer, min(_positive(arguments, "limit") or 10, MAX_CHARGES))

    def _create_refund(self, arguments: dict[str, Any]) -> Any:
        return self._api.refund(_text(arguments, "charge"), _positive(arguments, "amount"))


def _tool(name: str, description: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"name": name, "description": description, "inputSchema": schema}


# A schema is advice to the model, not a promise of it: arguments are checked like any other input.


def _text(arguments: dict[str, Any], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string")
    return value


def _positive(arguments: dict[str, Any], name: str) -> int | None:
    value = arguments.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{name} must be a whole number above 0")
    return value
