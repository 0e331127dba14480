"""Rows written as lines of JSON, and rows as they were read."""

import json


def write_lines(path, lines):
    """Write rows, as JSON, and raw bytes, a line each; returns the path as a str."""
    raw = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in lines]
    path.write_bytes(b"\n".join(raw))
    return str(path)


def texts(rows):
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
