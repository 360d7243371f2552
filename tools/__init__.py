"""What lies off the tutorial's path, in wings. In the repository's root: `python -m tools.WING.NAME --help`.

    models      base models in, embedders out: fetch, convert, export, serve, train in fp8
    data        training examples: batch API, cleaning, mining, public sets
    eval        test sets from the hub, passkey retrieval, MTEB's harness and format
    bench       speed and memory, beside the usual libraries and on a GPU
    study       the paper's claims in small

workflow.py is what `make base`, `data`, `train`, `eval`, `tour` and `bench` run; tour.py shows one example's
life, exercise.py checks a reader's answers, pictures.py draws README's pictures. embed.py (vectors and
search from the shell) and plot.py (plots of results) also run by path: `python tools/embed.py`.
"""
