"""examples/ocr_reward.py, geneval_reward.py and hpsv3_reward.py, each run against a double of what it needs. With an argument (the
rules.json of a set of reference numbers) the rules are held to its tables too. Python's standard library alone."""
import http.server
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
EXAMPLES = os.path.join(ROOT, "examples")
sys.path.insert(0, EXAMPLES)
sys.dont_write_bytecode = True
import geneval_reward as geneval
import ocr_reward as ocr

WIDTH, HEIGHT = 4, 2
PIL = '''
class Image:
    def __init__(self, size, data):
        self.size, self.data = size, data
    def save(self, out, kind):
        out.write(b"JPEG" + self.data)
def frombytes(mode, size, data):
    assert mode == "RGB" and len(data) == 3 * size[0] * size[1]
    return Image(size, data)
'''


def run(program, arguments, prompts, doubles):
    """Scores of a batch whose picture i is all bytes i, exit code and standard error."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in {"PIL/__init__.py": "", "PIL/Image.py": PIL, **doubles}.items():
            os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
            with open(os.path.join(folder, name), "w") as file:
                file.write(text)
        header = {"batch": 3, "count": len(prompts), "height": HEIGHT, "width": WIDTH, "ids": [f"s{i}" for i in range(len(prompts))],
                  "prompts": [{"text": text, "objects": []} for text in prompts]}
        data = json.dumps(header).encode() + b"\n" + b"".join(bytes([i]) * (HEIGHT * WIDTH * 3) for i in range(len(prompts)))
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, os.path.join(EXAMPLES, program), *arguments]
        done = subprocess.run(command, input=data, capture_output=True, timeout=120, env=environment, cwd=folder)
    lines = [json.loads(line) for line in done.stdout.decode().splitlines()]
    return (lines[1]["scores"] if len(lines) > 1 else None), done.returncode, done.stderr.decode()


def reading():
    double = '''
print("models are loaded")
def read(rgb, height, width):
    assert len(rgb) == 3 * height * width
    if rgb[0] == 3:
        raise RuntimeError("no memory")
    return [[("Hello ", 0.9), ("Wrld", 0.5), ("smudge", 0.0)], [("OPEN!", 1.0)], [], [], [("x", 1.0)]][rgb[0]]
'''
    prompts = ['says "Hello World"', 'a sign "open"', 'nothing "seen"', 'broken "x"', "no quotation"]
    scores, code, error = run("ocr_reward.py", ["--reader", "double:read"], prompts, {"double.py": double})
    assert (scores, code) == ([0.9, 1.0, 0.0, None, None], 0), (scores, code, error)
    assert "s3: not read: RuntimeError: no memory" in error and "s4: its prompt has no text" in error, error


class Unpickled:
    """A pickle that would run a program."""

    def __reduce__(self):
        return os.system, (f"touch {MARK}",)


MARK = os.path.join(tempfile.gettempdir(), f"geneval-{os.getpid()}")


def composition():
    bench = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"}
    bicycle = {"tag": "position", "prompt": "a bicycle right of a dog",
               "include": [{"class": "dog", "count": 1}, {"class": "bicycle", "count": 1, "position": ["right of", 0]}]}
    found = [{"bench": [{"box": [0.0, 0.0, 9.0, 9.0]}] * 3},
             {"dog": [{"box": [0.0, 100.0, 60.0, 160.0]}], "bicycle": [{"box": [200.0, 110.0, 260.0, 170.0]}]}]
    seen, answers = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = pickle.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            rows = [geneval.score(m, found[0 if m["tag"] == "single_object" else 1]) for m in body["meta_datas"]]
            good = pickle.dumps({"scores": [row[0] for row in rows], "strict_rewards": [row[1] for row in rows]})
            status, data = answers.pop(0) if answers else (200, good)
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    metadata = {"metadata.jsonl": json.dumps(bench) + "\n\n" + json.dumps(bicycle) + "\n"}
    arguments = ["--url", f"http://127.0.0.1:{server.server_address[1]}", "--metadata", "metadata.jsonl"]
    prompts = ["a bicycle right of a dog", "of another list", "a bench"]
    # what passes when it is asked again
    answers[:] = [(500, b""), (200, b"\x80\x04 no pickle"), (200, pickle.dumps({"scores": [1.0]}))]
    scores, code, error = run("geneval_reward.py", arguments, prompts, metadata)
    assert (scores, code) == ([1.0, None, -1.0], 0), (scores, code, error)
    assert seen[-1]["images"] == [b"JPEG" + bytes([i]) * 24 for i in (0, 2)] and not seen[-1]["only_strict"]
    scores, _, _ = run("geneval_reward.py", [*arguments, "--strict", "--batch", "1"], prompts, metadata)
    assert scores == [1.0, None, 0.0], scores
    answers[:] = [(200, pickle.dumps(Unpickled()))] * 9
    scores, code, error = run("geneval_reward.py", arguments, prompts, metadata)
    assert scores is None and code == 1 and "which is not built" in error and not os.path.exists(MARK), error
    answers[:] = [(200, pickle.dumps({"scores": [float("nan"), "x"]}))] * 9
    scores, code, error = run("geneval_reward.py", arguments, prompts, metadata)
    assert scores is None and code == 1 and "2 numbers were asked for" in error, error


def preference():
    double = '''
class HPSv3RewardInferencer:
    def __init__(self, device):
        assert device == "cpu"
    def reward(self, prompts, image_paths):
        return [[float("nan") if text == "bad" else len(text) + image.data[0] / 10, 0.5] for text, image in zip(prompts, image_paths)]
'''
    arguments = ["--device", "cpu", "--batch", "2"]
    scores, code, error = run("hpsv3_reward.py", arguments, ["one", "bad", "three"], {"hpsv3.py": double})
    assert (scores, code) == ([3.0, None, 5.2], 0), (scores, code, error)


def tables(path):
    with open(path) as file:
        rules = json.load(file)
    for case in rules["ocr"]["cases"]:
        got, wanted = ocr.ocr_score(case["prompt"], case["recognised"]), case["expected"]
        assert got == wanted or abs(got - wanted) < 1e-12, (case, got)
    for case in rules["geneval"]["cases"]:
        found = case["detections"]
        got = [*geneval.score(case["metadata"], found), geneval.official(case["metadata"], found)]
        wanted = [case["server_score"], case["server_strict"], case["official"]]
        assert all(abs(a - b) < 1e-12 for a, b in zip(got, wanted)), (case, got)
    print(f"{len(rules['ocr']['cases'])} readings, {len(rules['geneval']['cases'])} compositions of the tables")


if __name__ == "__main__":
    for test in [reading, composition, preference]:
        test()
        print(f"{test.__name__}: passed")
    if len(sys.argv) > 1:
        tables(sys.argv[1])
