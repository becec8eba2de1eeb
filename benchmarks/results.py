"""One JSON document a benchmark: what report.py and every later comparison read."""
import json
from pathlib import Path

from benchmarks import machine

RESULTS = Path(__file__).resolve().parent / "results"
SCHEMA = 1
FIELDS = {"schema": int, "benchmark": str, "machine": dict, "settings": dict, "ceilings": list, "rows": list}
SPREAD = {"median", "q1", "q3", "count"}


def document(benchmark, settings, ceilings, rows):
    """The results of a run. rows: dicts, in which a measured quantity is a spread (`timing.spread`) or None."""
    return {"schema": SCHEMA, "benchmark": benchmark, "machine": machine.describe(), "settings": settings,
            "ceilings": ceilings, "rows": rows}


def check(found):
    """Raises ValueError where a document is not one."""
    for name, kind in FIELDS.items():
        if type(found.get(name)) is not kind:
            raise ValueError(f"results: {name} must be a {kind.__name__}, got {found.get(name)!r}")
    if found["schema"] != SCHEMA:
        raise ValueError(f"results: schema {found['schema']}, expected {SCHEMA}")
    for row in found["rows"] + found["ceilings"]:
        for name, value in row.items():
            if isinstance(value, dict) and "median" in value and set(value) != SPREAD:
                raise ValueError(f"results: {name} must have {sorted(SPREAD)}, got {sorted(value)}")
    return found


def finish(found, save):
    """Ends a run: the document as the last line, and as results/<save>.json when a name is given."""
    if save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{save}.json"
        path.write_text(json.dumps(check(found), indent=1) + "\n")
    print(json.dumps(check(found)), flush=True)


def load_all(folder=RESULTS):
    """Name -> document, of every results file."""
    return {path.stem: check(json.loads(path.read_text())) for path in sorted(Path(folder).glob("*.json"))}
