"""What Prometheus would read of a host."""

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from .conftest import HostProcess

__all__ = ["Scrape", "scrape"]


class Scrape:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples = [
            (sample.name, dict(sample.labels), sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def find(self, name: str, **labels: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values of the samples of ``hayhost_<name>`` that have ``labels``."""
        return [
            (found, value)
            for each, found, value in self.samples
            if each == f"hayhost_{name}" and labels.items() <= found.items()
        ]

    def sum(self, name: str, **labels: str) -> float:
        """Of their values."""
        return sum(value for _, value in self.find(name, **labels))

    def values(self, name: str, label: str, **labels: str) -> set[str]:
        """All values of one label."""
        return {found[label] for found, _ in self.find(name, **labels)}


def scrape(host: HostProcess, **options: Any) -> Scrape:
    """Scrape a host that lets everybody."""
    answer = host.get("/metrics", **options)
    assert answer.status == 200, answer
    return Scrape(answer.body.decode())
