"""The tests here are collected only where `TRANSFORMERS_SOURCE` names a source distribution of transformers, unpacked.
`make test-upstream` sees to that. At the end stands what `docs/upstream_tests.md` shows."""

import os
import re
from collections import Counter, defaultdict

if "TRANSFORMERS_SOURCE" not in os.environ:
    collect_ignore_glob = ["test_*.py"]

MARKERS = """
    accelerate_tests all_flash_attn_test flash_attn_test flash_attn_3_test flash_attn_4_test generate
    is_tensor_parallel_test order slow torch_compile_test
"""
OUTCOMES = ("passed", "skipped", "failed")
outcomes: dict[tuple[str, str], str] = {}  # of each class and test; the worst, where a test has parts
reasons: dict[tuple[str, str], str] = {}


def pytest_configure(config):
    for marker in MARKERS.split():
        config.addinivalue_line("markers", f"{marker}: one of the library's")


def pytest_runtest_logreport(report):
    _, _, place = report.nodeid.partition("tests/upstream/")
    if not place or (report.when != "call" and report.passed):
        return
    test = tuple(place.split("::")[1:3])
    outcomes[test] = max(outcomes.get(test, "passed"), report.outcome, key=OUTCOMES.index)
    if report.skipped:
        reason = report.longrepr[2].removeprefix("Skipped: ")
        reasons[test] = re.sub(r"<class '\S+'>|\b[A-Z]\w*(Model|ModelLM|ForCausalLM)( class)?\b", "this model", reason)


def pytest_terminal_summary(terminalreporter):
    if not outcomes:
        return
    classes = list(dict.fromkeys(family for family, _ in outcomes))
    counted = {name: Counter(outcomes[test] for test in outcomes if test[0] == name) for name in classes}
    skipped = defaultdict(Counter)
    for (name, _), reason in reasons.items():
        skipped[reason][name] += 1
    line = lambda *cells: terminalreporter.write_line(f"| {' | '.join(str(cell) for cell in cells)} |")
    for head, rows in (
        ("", [(outcome, Counter({name: counted[name][outcome] for name in classes})) for outcome in OUTCOMES]),
        ("skipped because", sorted(skipped.items(), key=lambda row: -row[1].total())),
    ):
        terminalreporter.write_line("")
        line(head, *classes)
        line("---", *["---:"] * len(classes))
        for label, row in rows:
            line(label, *(row[name] for name in classes))
