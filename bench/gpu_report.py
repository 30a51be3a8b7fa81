#!/usr/bin/env python3
"""The rows of bench/gpu.sh: `add` appends one, `table` prints the table of a folder's parts and writes gpu.txt and gpu.json."""
import argparse
import calendar
import csv
import json
import os
import re
import statistics
import sys
import time

# what a row keeps of what a step printed that is no JSON
KEPT = 20_000


def add(args, command):
    row = {"part": args.part, "name": args.name, "command": command, "outcome": "left out", "why": args.why}
    if args.begun is not None:
        out, err = (open(path, errors="replace").read() for path in (args.stdout, args.stderr))
        results = []
        for line in out.splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                results.append(value)
        timed_out = args.code in (124, 137)
        row["outcome"] = "done" if args.code == 0 else "timed out" if timed_out else "failed"
        if timed_out:
            row["why"] = f"not done within {args.limit} s"
        elif args.code != 0:
            last = [line.strip() for line in err.splitlines() if line.strip()]
            # a panic's own line comes before the notes on backtraces
            row["why"] = f"exit code {args.code}: {last[-1] if last else 'nothing on stderr'}"
        row.update(begun=args.begun, seconds=args.ended - args.begun, code=args.code, results=results)
        row["utc_offset"] = time.localtime().tm_gmtoff
        if not results:
            row["text"] = (out + err)[-KEPT:]
    with open(args.rows, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{row['name']}: {row['outcome']}" + (f" ({row['why']})" if row["why"] else ""), file=sys.stderr)


def read_rows(folder):
    rows = []
    for name in sorted(os.listdir(folder)):
        if re.fullmatch(r"part-\d\.jsonl", name):
            with open(os.path.join(folder, name)) as file:
                rows += [json.loads(line) for line in file]
    if not rows:
        sys.exit(f"error: {folder} holds no part-N.jsonl")
    return rows


def number(text):
    try:
        return float(text)
    except ValueError:
        return None  # nvidia-smi writes [N/A] for what a card does not tell


def read_card(folder, utc_offset):
    """(time, SM clock, memory clock, watt, °C, MB) of the first card, every half second."""
    samples = []
    for name in sorted(os.listdir(folder)):
        if not re.fullmatch(r"part-\d\.smi\.csv", name):
            continue
        with open(os.path.join(folder, name)) as file:
            for line in csv.reader(file, skipinitialspace=True):
                # the last line may be cut off
                stamp = re.fullmatch(r"(.*)\.(\d+)", line[0]) if len(line) == 7 else None
                if not stamp:
                    continue
                try:
                    at = calendar.timegm(time.strptime(stamp[1], "%Y/%m/%d %H:%M:%S")) + float("0." + stamp[2])
                except ValueError:
                    continue
                samples.append((line[1], at - utc_offset, *map(number, line[2:])))
    return [sample[1:] for sample in samples if sample[0] == samples[0][0]]


def card_during(card, row):
    """Median clocks, power at most and on average, temperature and memory at most while a step ran; None without a log."""
    if "begun" not in row:
        return None
    during = [s for s in card if row["begun"] <= s[0] <= row["begun"] + row["seconds"]]
    columns = [[s[i] for s in during if s[i] is not None] for i in range(1, 6)]
    if not all(columns):
        return None
    sm, mem, watt, celsius, megabytes = columns
    return {
        "sm_mhz": statistics.median(sm), "sm_mhz_least": min(sm), "memory_mhz": statistics.median(mem),
        "watt_mean": statistics.mean(watt), "watt_most": max(watt), "celsius_most": max(celsius),
        "card_gb_most": max(megabytes) * 1024 * 1024 / 1e9,
    }


def what_of(result):
    """`rollout`, `update`, …; of the peer with how it was measured."""
    if "memory_format" not in result:
        return None
    how = f"compiled {result['compiled']}" if result["compiled"] else "eager"
    return f"peer {result['what']}, {how}, {result['memory_format']}, {result['weights']}"


def unit(result):
    """Seconds of one step of a roll-out, or of one update."""
    seconds = result["median_seconds"]
    return seconds / result["steps"] if result["what"] == "rollout" else seconds


def is_ours(result):
    return "ranks" in result and result.get("what") in ("rollout", "update") and not result["gradient_checkpointing"]


def lines_of(rows):
    """A dict per line of the table: a step, or each measurement of a step that made several."""
    # what the peer is compared with and percentages are of, part by part: another start may be on another card
    product, ours, flop = {}, {}, {}
    for row in rows:
        for result in row.get("results", []):
            if result.get("what") == "product":
                product[row["part"]] = result
            elif is_ours(result):
                kind = (row["part"], result["what"])
                # the first of a part: with graphs where there are any
                ours.setdefault(kind, unit(result))
                flop[kind] = result["tflop"] / (result["steps"] if result["what"] == "rollout" else 1)
    lines = []
    for row in rows:
        results = row.get("results", [])
        of_peer = [r for r in results if what_of(r)]
        if of_peer:
            shown = of_peer + ([{}] if row["outcome"] != "done" else [])
        else:
            shown = results[:1] or [{}]
        for result in shown:
            # what was measured before a step failed is measured
            whole = what_of(result) is None
            line = {"part": row["part"], "name": row["name"] if whole else what_of(result)}
            line["outcome"] = row["outcome"] if whole else "done"
            remarks = [row["why"]] if whole and row["why"] else []
            kind = (row["part"], result.get("what"))
            if "median_seconds" in result and result["what"] in ("rollout", "update"):
                line["ms"] = 1e3 * unit(result)
                line["per"] = "step" if result["what"] == "rollout" else "update"
                if kind in flop:
                    line["tflops"] = flop[kind] / unit(result)
                if what_of(result) and kind in ours:
                    line["times_ours"] = unit(result) / ours[kind]
                if result.get("ratio_drift") is not None:
                    remarks.append(f"ratio drift {result['ratio_drift']:.1e}")
            elif result.get("what") == "product":
                line["tflops"] = result["tflops"]
                first, last = result["tflops_first_second"], result["tflops_last_second"]
                remarks.append(f"{result['seconds']:.1f} s, first second {first:.4g}, last {last:.4g} TFLOP/s")
            elif result.get("what") == "iteration":
                line["ms"], line["per"] = 1e3 * result["median_seconds"], "iteration"
                stages = (f"{stage} {statistics.median(s):.3g} s" for stage, s in result["seconds"].items() if s and stage != "iteration")
                remarks.append(f"{result['samples_per_second_and_rank']:.3g} samples/s with decoding; " + ", ".join(stages))
                if result.get("leaves_out"):
                    remarks.append("without the paper's " + " and ".join(result["leaves_out"]))
            elif "kernels" in result:
                copy = result["rates"]["copy_gigabytes_per_second"]
                remarks.append(f"{len(result['kernels'])} operations, copy {copy:.4g} GB/s (each in gpu.json)")
            if row["name"].startswith("test "):
                text = row.get("text", "")
                counts = re.findall(r"test result: .*?(\d+) passed; (\d+) failed", text)
                if counts:
                    remarks.append(f"{counts[-1][0]} passed, {counts[-1][1]} failed")
                if "SKIPPED" in text:
                    remarks.append("skipped, nothing was tested: no GPU")
            warm_up = result.get("warm_up_seconds") or []
            if warm_up:
                line["first_s"] = warm_up[0]
            memory = result.get("memory") or {}
            line["peak_gb"] = memory.get("peak_allocated_gb", memory.get("host_peak_gb"))
            if "tflops" in line:
                of = product.get(row["part"])
                if of:
                    line["of_product"] = line["tflops"] / of["tflops"]
                    if of.get("nominal_tflops"):
                        line["of_nominal"] = line["tflops"] / of["nominal_tflops"]
            line["card"] = row.get("card")
            line["remark"] = "; ".join(remarks)
            lines.append(line)
    return lines


def table(folder):
    rows = read_rows(folder)
    # nvidia-smi writes the time of its machine's place
    card = read_card(folder, next((row["utc_offset"] for row in rows if "utc_offset" in row), 0))
    for row in rows:
        row["card"] = card_during(card, row)
    lines = lines_of(rows)

    def cell(value, form):
        return "-" if value is None else format(value, form)

    heads = ["part", "step", "outcome", "ms", "per", "TFLOP/s", "nominal", "product", "x ours", "first s", "peak GB",
             "SM MHz", "W", "°C", "card GB", "remark"]
    cells = []
    for line in lines:
        on_card = line["card"] or {}
        cells.append([
            str(line["part"]), line["name"], line["outcome"], cell(line.get("ms"), ".2f"), line.get("per", "-"),
            cell(line.get("tflops"), ".4g"), cell(line.get("of_nominal"), ".1%"), cell(line.get("of_product"), ".1%"),
            cell(line.get("times_ours"), ".2f"), cell(line.get("first_s"), ".2f"), cell(line["peak_gb"], ".2f"),
            cell(on_card.get("sm_mhz"), ".0f"), cell(on_card.get("watt_mean"), ".0f"),
            cell(on_card.get("celsius_most"), ".0f"), cell(on_card.get("card_gb_most"), ".1f"), line["remark"],
        ])
    widths = [max(len(row[i]) for row in [heads, *cells]) for i in range(len(heads) - 1)]
    text = "".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[-1]]).rstrip() + "\n" for row in [heads, *cells])
    text += ("nominal, product: part of the card's nominal rate and of the matrix product that this part sustained; "
             "x ours: the peer's\ntime in rldiff's of the same part; peak GB: what tensors held at most; clocks and "
             "power: median and mean while the step ran\n")
    print(text, end="")
    with open(os.path.join(folder, "gpu.txt"), "w") as file:
        file.write(text)
    with open(os.path.join(folder, "gpu.json"), "w") as file:
        json.dump({"lines": lines, "rows": rows}, file, indent=1)
        file.write("\n")


def main():
    arguments, command = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, command = arguments[:at], arguments[at + 1:]
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("add")
    one.add_argument("rows")
    one.add_argument("--part", type=int, required=True)
    one.add_argument("--name", required=True)
    one.add_argument("--why", default="")
    one.add_argument("--begun", type=float)
    one.add_argument("--ended", type=float)
    one.add_argument("--limit", type=int)
    one.add_argument("--code", type=int)
    one.add_argument("--stdout")
    one.add_argument("--stderr")
    of_folder = verbs.add_parser("table")
    of_folder.add_argument("folder")
    args = parser.parse_args(arguments)
    if args.verb == "add":
        add(args, command)
    else:
        table(args.folder)


if __name__ == "__main__":
    main()
