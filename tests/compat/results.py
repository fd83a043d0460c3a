"""What came of each version of Synapse, as the repository keeps it, and a table of it."""

import json
import re
from typing import Any

import attr
from packaging.version import Version

from tests.compat import LISTED, is_expected_to_fit
from tests.compat.environment import PROJECT

FOLDER = PROJECT / "docs" / "compat"
PAGE = PROJECT / "docs" / "versions.md"
BEGIN = "<!-- The table of make compat -->"
END = "<!-- The end of the table of make compat -->"
PASSED = "passed"
STORY = ("newcomer", "flood", "sliding_join", "redaction")
REFUSAL = ("refusal",)
# What differs from machine to machine: where Synapse is installed, and addresses in memory.
_WHERE_INSTALLED = re.compile(r"/\S*/(?:site|dist)-packages/")
_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")


def told_of(version: str) -> tuple[str, ...]:
    """The parts of the story that are told of this version."""
    return STORY if is_expected_to_fit(version) else REFUSAL


@attr.s(auto_attribs=True, frozen=True)
class Result:
    """What came of one version of Synapse.

    check: what the module's check printed; None if it did not answer.
    story: how each part of the story ended.
    """

    synapse: str
    check: dict[str, Any] | None
    story: dict[str, str]

    def problems(self) -> list[str]:
        """What is not as it should be, each with its step."""
        found = [] if self.check is None else self._problems_of_check(self.check)
        for part in told_of(self.synapse):
            outcome = self.story.get(part, "was not told")
            if outcome != PASSED:
                found.append(f"story, {part}: {outcome}")
        return found

    def _problems_of_check(self, check: dict[str, Any]) -> list[str]:
        wanted = 0 if is_expected_to_fit(self.synapse) else 2
        said = _said(check)
        if (code := check["exit_code"]) != wanted:
            why = "; ".join(said) or "it does not say why"
            return [f"check: exit code {code}, should be {wanted}: {why}"]
        if code and not said:
            return ["check: it does not say why this Synapse does not fit"]
        return []

    def keep(self) -> None:
        """Writes it to where it is kept."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        text = json.dumps(attr.asdict(self), indent=1, sort_keys=True, ensure_ascii=False)
        (FOLDER / f"{self.synapse}.json").write_text(text + "\n")

    def row(self) -> str:
        """Its row of the table."""
        cells = [f"[{self.synapse}](compat/{self.synapse}.json)", self._verdict()]
        if is_expected_to_fit(self.synapse):
            cells += ["yes" if self.story.get(p) == PASSED else "**no**" for p in STORY]
        else:
            cells += ["-"] * len(STORY)
        return f"| {' | '.join(cells)} |"

    def _verdict(self) -> str:
        if self.check is None:
            return "**no answer**"
        code = self.check["exit_code"]
        if not is_expected_to_fit(self.synapse):
            fits = "**fits**" if code == 0 else "does not fit"
            refused = self.story.get("refusal") == PASSED
            return f"{fits}; Synapse {'refuses to start' if refused else '**starts**'}"
        if code == 0:
            return "fits"
        duties = self.check.get("duties", {})
        unfit = ", ".join(sorted(name for name in duties if duties[name].get("state") == "unfit"))
        verdict = "partly" if code == 1 else "does not fit"
        return f"**{verdict}**" + (f": without {unfit}" if unfit else "")


def _said(check: dict[str, Any]) -> list[str]:
    """Everything that the check found."""
    access = check.get("access") or {}
    said = [*check.get("stops", ()), *check.get("problems", ()), *access.get("misfits", ())]
    for name, duty in check.get("duties", {}).items():
        said += [f"{name}: {misfit}" for misfit in duty.get("misfits", ())]
    return list(dict.fromkeys(said))


def read_check(printed: str) -> dict[str, Any]:
    """What the check printed, without what is not about Synapse.

    Raises:
        ValueError: it printed something else.
    """
    try:
        check = json.loads(_ADDRESS.sub("0x...", _WHERE_INSTALLED.sub("", printed)))
    except json.JSONDecodeError:
        raise ValueError("it printed no JSON") from None
    if not isinstance(check, dict) or not {"synapse", "exit_code"} <= check.keys():
        raise ValueError("it printed other JSON than the check's")
    check.pop("module", None)
    return check


def kept() -> list[Result]:
    """All that is kept, the oldest Synapse first."""
    results = [Result(**json.loads(path.read_text())) for path in FOLDER.glob("*.json")]
    return sorted(results, key=lambda result: Version(result.synapse))


def table(results: list[Result]) -> str:
    """the table of docs/versions.md."""
    names = [part.replace("_", " ") for part in STORY]
    lines = [f"| Synapse | check | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    return "\n".join([*lines, *(result.row() for result in results)])


def with_table(text: str, results: list[Result]) -> str:
    """The text of the page, with the table between its markers.

    Raises:
        ValueError: the markers are not there.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"docs/versions.md has not one {BEGIN} and one {END}")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}"


def write_table() -> None:
    """Writes the table into the page.

    Raises:
        ValueError: its markers are not there.
    """
    PAGE.write_text(with_table(PAGE.read_text(), kept()))


def stale() -> list[str]:
    """Why the table of docs/versions.md is not to be believed."""
    results = kept()
    versions = {result.synapse for result in results}
    found = [f"Nothing is kept of Synapse {v}: make compat" for v in LISTED if v not in versions]
    text = PAGE.read_text()
    try:
        agrees = text == with_table(text, results)
    except ValueError as e:
        return [*found, str(e)]
    if not agrees:
        found.append("docs/versions.md's table is stale: python -m tests.compat --table")
    return found
