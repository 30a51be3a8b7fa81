"""schedulers.json: the config of every scheduler of diffusers 0.42.1 that has betas, as it writes it (-Infinity included).

    python make_schedulers.py
"""
import inspect
import json
import pathlib

import diffusers

configs = {}
for name in sorted(n for n in dir(diffusers) if n.endswith("Scheduler") and "Flax" not in n):
    try:
        scheduler = getattr(diffusers, name)
        keys = inspect.signature(scheduler.__init__).parameters
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        config = json.loads(scheduler(**{k: v for k, v in betas.items() if k in keys}).to_json_string())
        configs[name] = config
    except Exception as e:
        print(name, type(e).__name__, str(e)[:80])
text = ",\n".join(f"{json.dumps(name)}: {json.dumps(config, sort_keys=True)}" for name, config in configs.items())
(pathlib.Path(__file__).parent / "schedulers.json").write_text("{\n" + text + "\n}\n")
print(len(configs), list(configs))
