"""What keeps the four lessons safe, one job a file. No file here imports a lesson.

    errors      how a script refuses: one line, exit code 2; flags with bounds
    files       JSON and JSON lines in, whole files out, logs that survive a kill
    ranks       several processes as one, under torchrun

    checkpoint  model folders and adapters on disk
    supported   what these folders may say, and what is refused
    examples    training examples, out of files of any size
    run         a training run's folder, checkpoints, log and signals

    client      the same request again, until it is answered
    transport   one try over the wire, before a deadline
    limits      how long to wait before the next one, and who waits
    complaints  what a server means that answers with an error
    completion  what an answer holds
    threads     many requests at once
    batches     what waits at a provider's batch API
    ledger      a live run's folder: what was asked, answered and paid
    pools       the settings and tasks that decide a run's requests
    answers     what an LLM wrote -> an object, a list of tasks, or the reason why not
    remembered  what was made of large files, for the rerun
    texts       is a text fit to be trained on?
    refusals    how LLMs say no, in eighteen languages
    report      counts beside the paper's; tokens, money and time before a run

    tasks       task folders on disk -> rows that are known to be whole
    blocks      a million texts through an embedder
    cache       vectors on disk, for the rerun
    metrics     vectors -> scores, each as mteb computes it
    logistic    a classifier as scikit-learn fits it
    lbfgs       the steps of its minimiser, as scipy takes them
    kmeans      clusters as scikit-learn finds them, draw for draw
    finished    the scores of tasks that are done, for the rerun
    table       averages, the paper's figures, the table
    progress    how far a long loop has come
"""
