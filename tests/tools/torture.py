"""Cut a training off again and again, and see that it ends as if nothing had been. By hand: it takes minutes.

python tests/tools/torture.py                 30 times Ctrl-C and 30 times kill -9, at random moments, in float32, bfloat16 and float16
python tests/tools/torture.py --times 5       fewer
python tests/tools/torture.py --same 8        8 processes of one float32 run of 60 steps on two threads: how many sets of weights?
python tests/tools/torture.py --ranks         two processes that share a run, as on two GPUs: one is killed, one hangs, torchrun starts them again
python tests/tools/torture.py --cost          what the files of a run of the lesson's model cost

The model is tiny and computes on one thread. A file is written after every fifth of a second, slowly, so that many signals fall into
the writing. One signal in five is two of Ctrl-C in a row. Each start of a worker gets one signal, at a random moment of what is
left of the run, and the next start goes on from the file; when a run comes to its end, the next one begins. After every end weights, history (but
for the seconds) and the random generator must be those of the undisturbed run, and no file may be left. Exit status 1 otherwise.
"""
import argparse
import contextlib
import hashlib
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import notebook
import torch


def data_for(folder):
    """A small data set and its tokenizer, made once, in files."""
    import conftest
    nb = notebook.load()
    dataset = nb.make_dataset(nb.parse_persona(conftest.SMALL), 3_800)
    tokenizer = nb.BPETokenizer.train(nb.chat_texts(dataset["train"]), 350)
    tokenizer.save(folder / "tokenizer.json")
    torch.save({"train": [tuple(c) for c in dataset["train"]], "val": [tuple(c) for c in dataset["val"][:100]]}, folder / "data.pt")


def worker(folder, precision, steps, threads, slow):
    """One call of train. Says "ready" when signals may come, and at the end a hash of all that must be equal."""
    torch.set_num_threads(threads)
    nb = notebook.load()
    dataset = {name: [nb.Conversation(*c) for c in part] for name, part in torch.load(folder / "data.pt", weights_only=True).items()}
    tokenizer = nb.BPETokenizer.load(folder / "tokenizer.json")
    torch.manual_seed(0)
    model = nb.GuppyLM(nb.GuppyConfig(vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, ffn=64, dropout=0.1))
    recipe = nb.Recipe(steps=steps, every=max(1, steps // 4), lr=3e-3, warmup=5, precision=precision)
    nb.TrainingRun.save_every = 0.2
    if slow:
        rate, write = nb.learning_rate, nb.TrainingRun.write

        def slow_rate(recipe, step):
            time.sleep(0.005)
            return rate(recipe, step)

        def slow_write(run, content, path):
            """The file in two halves, with a pause: a killed process leaves the first."""
            new = run.path.with_suffix(".new")
            torch.save(content, new)
            whole = new.read_bytes()
            new.write_bytes(whole[:len(whole) // 2])
            time.sleep(0.05)
            write(run, content, path)
        nb.learning_rate, nb.TrainingRun.write = slow_rate, slow_write
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("ready", flush=True)
    try:
        history = nb.train(model, tokenizer, dataset, recipe, ["hello"], folder / "out" if slow else None)
    except KeyboardInterrupt:
        sys.exit(130)
    if not history or history[-1]["step"] < steps:
        sys.exit(131)                                                # stopped after a step
    digest = hashlib.sha256()
    for entry in history:
        digest.update(repr([entry[key] for key in ("step", "tokens", "loss", "val", "losses", "diary")]).encode())
        for name, p in entry["weights"].items():
            digest.update(p.numpy().tobytes())
    weights = hashlib.sha256(b"".join(p.numpy().tobytes() for p in model.state_dict().values())).hexdigest()
    digest.update(torch.get_rng_state().numpy().tobytes())
    print(f"\nEND {weights[:12]} {digest.hexdigest()[:12]}", flush=True)


# ---- two processes that share a run ----

def rank_worker(folder, steps):
    """One of the processes that torchrun starts. Writes its number and process id to a file, and at the end, as rank 0, its hash."""
    torch.set_num_threads(1)
    nb = notebook.load()
    nb.join_ranks()
    dataset = {name: [nb.Conversation(*c) for c in part] for name, part in torch.load(folder / "data.pt", weights_only=True).items()}
    tokenizer = nb.BPETokenizer.load(folder / "tokenizer.json")
    torch.manual_seed(0)
    model = nb.GuppyLM(nb.GuppyConfig(vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, ffn=64))
    nb.TrainingRun.save_every = 0.2
    rate = nb.learning_rate

    def slow_rate(recipe, step):
        (folder / f"rank{nb.RANK}").write_text(f"{os.getpid()} {step}")
        time.sleep(0.02)
        return rate(recipe, step)
    nb.learning_rate = slow_rate
    recipe = nb.Recipe(steps=steps, every=max(1, steps // 4), lr=3e-3, warmup=5, precision="float32")
    history = nb.train(model, tokenizer, dataset, recipe, ["hello"], folder / "out")
    digest = hashlib.sha256(repr([[entry[key] for key in ("step", "tokens", "loss", "val", "losses", "diary")] for entry in history]).encode())
    nb.leave_ranks()
    print(f"\nEND {digest.hexdigest()[:12]}", flush=True)


def rank_at(folder, rank, step):
    """The process id of a rank, once it has come to a step; the file is then taken away, so that the next start writes it anew."""
    path = folder / f"rank{rank}"
    for _ in range(3_000):
        time.sleep(0.1)
        with contextlib.suppress(OSError, ValueError):
            number, at = map(int, path.read_text().split())
            if at >= step:
                path.unlink()
                return number
    sys.exit(f"rank {rank} did not come to step {step} within five minutes")


def torchrun(folder, steps, restarts):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}",
               __file__, "--rank-worker", str(folder), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def by_hand(folder, steps):
    """The two processes without torchrun, as they are when a whole machine of several is gone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [subprocess.Popen([sys.executable, __file__, "--rank-worker", str(folder), str(steps)], env=shared | {"RANK": rank, "LOCAL_RANK": rank},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in "01"]


def torture_ranks(folder, steps=60):
    """Returns how many of the cases went wrong."""
    wrong = 0

    def report(case, seconds, good, said):
        nonlocal wrong
        wrong += not good
        for path in folder.glob("rank?"):
            path.unlink()
        print(f"{case}: {'well' if good else 'WRONG'}, {seconds:.1f} s\n    {said}", flush=True)

    started, process = time.time(), torchrun(folder, steps, 0)
    expected = end_of(process)
    report("undisturbed", time.time() - started, expected, expected)

    process = torchrun(folder, steps, 0)
    os.kill(rank_at(folder, 1, 20), signal.SIGKILL)
    started, (out, error) = time.time(), process.communicate(timeout=300)
    told = [line for line in error.splitlines() if "SIGKILL" in line or "process 0 of 2 ends" in line]
    seconds = time.time() - started
    report("rank 1 killed under torchrun", seconds, process.returncode and seconds < 60 and told, told[:1])

    for name, number in (("killed", signal.SIGKILL), ("hanging", signal.SIGSTOP)):
        processes = by_hand(folder, steps)
        os.kill(rank_at(folder, 1, 40), number)
        started, (out, error) = time.time(), processes[0].communicate(timeout=300)
        seconds = time.time() - started
        processes[1].kill()
        processes[1].communicate()
        told = [line for line in error.splitlines() if line.startswith("process 0 of 2 ends")]
        report(f"rank 1 {name}, without torchrun", seconds, processes[0].returncode and seconds < 60 and told, told[:1])

    process = torchrun(folder, steps, 2)                             # goes on from what the others left
    os.kill(rank_at(folder, 1, 45), signal.SIGKILL)
    os.kill(rank_at(folder, 0, 50), signal.SIGKILL)
    started, (out, error) = time.time(), process.communicate(timeout=300)
    ends = [line[4:] for line in out.splitlines() if line.startswith("END ")]
    went_on = [line for line in out.splitlines() if "going on after step" in line]
    left = list((folder / "out").glob("training-*"))
    report("killed twice with --max-restarts=2", time.time() - started, ends == [expected] and len(went_on) == 3 and not left, [*went_on, *ends, *left])
    return wrong


# ---- what the files cost ----

def cost(folder):
    """Print how long a run of the lesson's model takes to write its file, beside the time between two files."""
    nb = notebook.load()
    dataset = {name: [nb.Conversation(*c) for c in part] for name, part in torch.load(folder / "data.pt", weights_only=True).items()}
    tokenizer = nb.BPETokenizer.load(folder / "tokenizer.json")
    model = nb.GuppyLM(nb.GuppyConfig())
    seconds, save = [], nb.TrainingRun.save

    def timed(run):
        started = time.perf_counter()
        save(run)
        seconds.append(time.perf_counter() - started)
        sizes[:] = [path.stat().st_size for path in run.path.parent.glob("training-*.pt")]
    sizes, nb.TrainingRun.save = [], timed
    nb.TrainingRun.save_every = 0                                    # a file in every step
    nb.train(model, tokenizer, dataset, nb.Recipe(steps=8, every=4, batch=2), (), folder / "cost")
    typical, every = statistics.median(seconds[2:]), 60
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters: a file of {sizes[0] / 1e6:.0f} MB in {typical:.2f} s (longest {max(seconds):.2f} s)")
    print(f"one every {every} s of training: {typical / every:.1%} of the time; what a kill loses: {every} s of training at most")


def start(folder, precision, steps, threads=1, slow=True):
    command = [sys.executable, __file__, "--worker", str(folder), precision, str(steps), str(threads), str(int(slow))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})


def end_of(process):
    """What a worker printed last: its hashes, or None when it was cut."""
    out, error = process.communicate(timeout=300)
    lines = [line for line in out.splitlines() if line.startswith("END ")]
    if not lines and process.returncode not in (130, 131, -signal.SIGKILL, -signal.SIGINT):
        sys.exit(f"a worker ended with {process.returncode}:\n{error[-3_000:]}")
    return lines[-1][4:] if lines else None


def wait_until_ready(process):
    for line in process.stdout:
        if line.strip() == "ready":
            return


def torture(folder, precision, steps, times, rng):
    """`times` signals of each kind; returns how many ends there were, and how many of them were wrong."""
    process = start(folder, precision, steps)
    wait_until_ready(process)
    started = time.time()
    expected, seconds = end_of(process), time.time() - started
    seen, ends, wrong = Counter(), 0, 0
    signals = [signal.SIGINT] * times + [signal.SIGKILL] * times
    rng.shuffle(signals)
    for number in [*signals, None]:                                  # the last start is left alone
        process = start(folder, precision, steps)
        wait_until_ready(process)
        if number:
            time.sleep(rng.uniform(0, 0.5 * seconds))
            process.send_signal(number)
            if number == signal.SIGINT and rng.random() < 0.2:
                time.sleep(rng.uniform(0, 0.02))
                process.send_signal(number)
        end = end_of(process)
        seen[{None: "ended", 130: "KeyboardInterrupt", 131: "stopped", -9: "killed", -2: "ended by SIGINT"}.get(process.returncode, "ended")] += 1
        if end:
            left = [path.name for path in (folder / "out").glob("training-*")]
            ends += 1
            wrong += end != expected or bool(left)
            if end != expected or left:
                print(f"  {precision}: {end} instead of {expected}, files left: {left}")
    print(f"{precision}: a run of {seconds:.1f} s, {dict(seen)}; {ends} ends, {wrong} wrong", flush=True)
    return ends, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=30, help="signals of each kind, for each precision")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"), help="this one alone")
    parser.add_argument("--same", type=int, metavar="N", help="N processes of the same run on two threads, and nothing else")
    parser.add_argument("--ranks", action="store_true", help="two processes that share a run, and nothing else")
    parser.add_argument("--cost", action="store_true", help="what the files of a run cost, and nothing else")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--rank-worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_worker:
        return rank_worker(Path(options.rank_worker[0]), int(options.rank_worker[1]))
    if options.worker:
        folder, precision, steps, threads, slow = options.worker
        return worker(Path(folder), precision, int(steps), int(threads), int(slow))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data_for(folder)
        if options.ranks:
            sys.exit(torture_ranks(folder))
        if options.cost:
            return cost(folder)
        if options.same:
            ends = Counter(end_of(start(folder, "float32", 60, threads=2, slow=False)).split()[0] for _ in range(options.same))
            print(f"{options.same} processes, 60 steps in float32 on two threads: {len(ends)} sets of weights, {dict(ends)}")
            return
        results = [torture(folder, precision, options.steps, options.times, random.Random(options.seed))
                   for precision in ([options.precision] if options.precision else ["float32", "bfloat16", "float16"])]
        if any(wrong or not ends for ends, wrong in results):
            sys.exit(1)


if __name__ == "__main__":
    main()
