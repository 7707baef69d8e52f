"""What does estimating an input covariance cost, in time beside the text encoder's own, and in memory?

    python benchmarks/bench_covariance.py

A round encodes the same captions in four ways, in turn: the text encoder alone, on ready token ids; tokenizer
and text encoder; the whole estimate, as `calculate_input_covariance` makes it; and the estimate with products
in float32. A figure is the median over rounds of the text encoder's time over the contender's: 1 costs
nothing.

The text encoders are the small model's, and random ones with the configurations of Stable Diffusion 1.5's and
(on request) 2.1's, whose prompts have 77 tokens. The error is that of the small model's similarities r with
float32 products, against float64. Memory is the peak of processes that differ only in the number of captions.
On a machine that is busy with other work, `--clock cpu --num_threads 1` counts the processor's time instead
of the wall's.

The script writes all figures to `--output`, with versions, threads and device, as JSON.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

HERE = Path(__file__).parent
MODEL = HERE.parent / "examples" / "shapes" / "tiny-sd"
WIDTHS = {  # hidden_size, intermediate_size, layers, heads, activation, tokens
    "Stable Diffusion 1.5": (768, 3072, 12, 12, "quick_gelu", 77),
    "Stable Diffusion 2.1": (1024, 4096, 23, 16, "gelu", 77),
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "gray", "pink", "orange", "brown")


def captions(count):
    """Yield captions of words that the small model knows."""
    nouns = ("car", "bear", "house")
    for i in range(count):
        a, b, n = i % 10, i // 10 % 10, i // 100 % 3
        yield f"a photo of a {COLOURS[a]} {nouns[n]} on a {COLOURS[b]} background"


def pipeline_of(name, device):
    """Return what `prompt_encoder` uses of a pipeline: text encoder, tokenizer, and a configuration."""
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    tokenizer = AutoTokenizer.from_pretrained(MODEL / "tokenizer")
    if name == "small model":
        encoder = CLIPTextModel.from_pretrained(MODEL / "text_encoder").float()
    else:
        width, inner, layers, heads, activation, tokens = WIDTHS[name]
        tokenizer.model_max_length = tokens
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            hidden_act=activation,
            max_position_embeddings=tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        torch.manual_seed(0)
        encoder = CLIPTextModel(config)
    unet = torch.nn.Module()
    unet.config = SimpleNamespace(cross_attention_dim=encoder.config.hidden_size)
    return SimpleNamespace(tokenizer=tokenizer, text_encoder=encoder.to(device).eval(), unet=unet)


def timed(run, device, clock):
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def throughput(name, *, batch_size, count, rounds, device, clock):
    """Return the text encoder's captions per second, and the others' relative to it."""
    from perfusion_pytorch import InputCovariance, calculate_input_covariance
    from perfusion_pytorch.pipelines.encoding import encode_token_ids, prompt_encoder, token_ids

    pipe, texts = pipeline_of(name, device), list(captions(count))
    encode = prompt_encoder(pipe)
    batches = [texts[i : i + batch_size] for i in range(0, count, batch_size)]
    ready = [{key: ids.to(device) for key, ids in token_ids(pipe, batch).items()} for batch in batches]
    finals = {}

    @torch.no_grad()
    def encoder_alone():
        for ids in ready:
            encode_token_ids(pipe, ids)

    def with_tokenizer():
        for batch in batches:
            encode(batch)

    def estimate():
        finals["float64"] = calculate_input_covariance(texts, encode, batch_size=batch_size, ridge=1e-6)

    def in_float32():
        total, tokens = 0, 0
        for batch in batches:
            rows = encode(batch)[0].flatten(0, 1)
            total, tokens = total + (rows.mT @ rows).cpu().double(), tokens + len(rows)
        finals["float32"] = InputCovariance(total / tokens, num_tokens=tokens, ridge=1e-6)

    contenders = {
        "encoder": encoder_alone,
        "tokenizer and encoder": with_tokenizer,
        "estimate": estimate,
        "float32 products": in_float32,
    }
    times = {key: [] for key in contenders}
    for i in range(rounds + 1):  # the first warms up
        for key, run in contenders.items():
            seconds = timed(run, device, clock)
            if i:
                times[key].append(seconds)
    relative = {
        key: median(a / b for a, b in zip(times["encoder"], times[key], strict=True)) for key in contenders
    }
    of_both = median(a / b for a, b in zip(times["tokenizer and encoder"], times["estimate"], strict=True))
    found = {
        "batch size": batch_size,
        "captions a second, encoder alone": count / median(times["encoder"]),
        "relative to the encoder alone": relative,
        "estimate relative to tokenizer and encoder": of_both,
    }
    if name == "small model":  # the others have seen too few captions for an inverse
        found["largest error of r with float32 products"] = error_of(
            finals, encode(texts[:8])[0].cpu().double()
        )
    return found


def error_of(finals, encodings):
    """Return how much the similarity of any two tokens differs with the covariances of both precisions."""
    inverses = [finals[key].inverse("cpu", torch.float64) for key in ("float64", "float32")]
    tokens = encodings.flatten(0, 1)
    exact, rough = (tokens @ C @ tokens.mT / (tokens @ C @ tokens.mT).diagonal() for C in inverses)
    return (exact - rough).abs().max().item()


def peak_memory(count):
    """Return the peak resident memory, in MB, of a process that estimates the small model's covariance."""
    program = f"""
import re, sys, tempfile
sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
import bench_covariance as bench
import torch
from perfusion_pytorch.captions.sources import CaptionFile
from perfusion_pytorch.pipelines.covariance_cache import cached_covariance
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "captions.txt"
    with open(path, "w") as file:
        file.writelines(caption + "\\n" for caption in bench.captions({count}))
    pipe = bench.pipeline_of("small model", torch.device("cpu"))
    cached_covariance(pipe, CaptionFile(path), cache_dir=folder, progress=False)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(int(peak[1]) / 1024)
"""
    return float(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--models", nargs="+", default=["small model", "Stable Diffusion 1.5"])
    parser.add_argument(
        "--num_captions",
        nargs="+",
        type=int,
        default=[1_000, 30_000],
        help="of the processes whose memory is measured",
    )
    parser.add_argument("--output", type=Path, default=HERE / "bench_covariance.json")
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    speed = {}
    for name in args.models:
        sizes = {"batch_size": 64, "count": 512} if name == "small model" else {"batch_size": 8, "count": 16}
        rounds = args.rounds if name == "small model" else min(args.rounds, 5)
        speed[name] = throughput(name, **sizes, rounds=rounds, device=args.device, clock=CLOCKS[args.clock])
    results = {
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "device": f"{args.device}, {platform.machine()}"
        if args.device.type == "cpu"
        else torch.cuda.get_device_name(args.device),
        "clock": args.clock,
        "throughput": speed,
        "peak memory of a process in MB, by number of captions": {
            count: peak_memory(count) for count in args.num_captions
        },
    }
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
