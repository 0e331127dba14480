"""Rows written as lines of JSON, and rows as they were read."""

import json


def write_lines(path, lines):
    path.write_bytes(
        b"\n".join(each if isinstance(each, bytes) else dumped(each) for each in lines)
    )
    return str(path)


def dumped(row):
    return json.dumps(row).encode()


def texts(rows):
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
