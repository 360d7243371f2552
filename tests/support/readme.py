"""The commands of a README section, as a user would copy them."""
import re

from scripts import ROOT


def commands(title: str) -> list[str]:
    """The lines of the section's shell blocks that run something; a backslash at a line's end goes on."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    shell = "".join(re.findall(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL))
    lines = shell.replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"\. |make |python ", line)]
