"""tools/pictures.py: three pictures for README, as SVG: the data's way, the cached gradient, the scores.

    python -m tools.pictures            # writes pictures/*.svg anew

A picture is text, the same on every machine, and its changes can be read in a diff. Which cells of the score
matrix are masked is not drawn by hand: `train.prepare` says so of the little batch below.

Sizes are pixels at README's width. Fonts differ between machines, so a line of text gets room for wide
letters, and one that would run out of its box ends the script.
"""
import math
import tempfile
from html import escape
from pathlib import Path

import train
from plumbing.errors import Parser, check, command
from plumbing.examples import Examples
from plumbing.files import write_jsonl, write_text

WIDTH = 850
INK, QUIET, LINE, PAPER = "#1f2328", "#57606a", "#8c959f", "#ffffff"
YELLOW, BLUE, GREEN, PURPLE = "#fff4d9", "#e3effd", "#e3f6e6", "#f2e9fc"       # a lesson each
RED, GREY = "#fde0dc", "#eaeef2"
STRONG_BLUE, STRONG_RED = "#1f6feb", "#c93c37"
SANS, MONO = "Helvetica, Arial, sans-serif", "Menlo, Consolas, monospace"
WIDE = {"sans": 0.54, "bold": 0.57, "mono": 0.602}     # a letter's mean width over its size, at most


# ---------------------------------------------------------------------------------------------- drawing

class Picture:
    """A sheet of paper. Coordinates go right and down from its upper left corner."""

    def __init__(self, title: str, height: int):
        self.title, self.height = title, height
        self.parts = []
        self.rectangle(0.5, 0.5, WIDTH - 1, height - 1, PAPER, "#d0d7de", 8)     # white in dark mode, too
        self.text(20, 32, title, 17, bold=True)

    def add(self, part: str) -> None:
        self.parts.append(part)

    def rectangle(self, x, y, width, height, fill, line=LINE, corner=4, thick=1):
        self.add(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{corner}" fill="{fill}" '
                 f'stroke="{line}" stroke-width="{thick}"/>')

    def text(self, x, y, words, size=13, bold=False, mono=False, ink=INK, anchor="start", turn=0, room=None):
        """One line, its base at y. anchor: which end stands at x. turn: degrees. room: its box's width."""
        font = "mono" if mono else "bold" if bold else "sans"
        room = room or {"start": WIDTH - 20 - x, "end": x - 20, "middle": 2 * min(x, WIDTH - x) - 40}[anchor]
        check(turn or len(words) * size * WIDE[font] <= room,
              f"{self.title}: wider than its {room} pixels: {words}")
        more = ' font-weight="bold"' if bold else ""
        if turn:
            more += f' transform="rotate({turn} {x} {y})"'
        self.add(f'<text x="{x}" y="{y}" font-family="{MONO if mono else SANS}" font-size="{size}" '
                 f'fill="{ink}" text-anchor="{anchor}" xml:space="preserve"{more}>{escape(words)}</text>')

    def note(self, x, y, words, **more):
        """A line of small print."""
        self.text(x, y, words, 12, ink=QUIET, **more)

    def path(self, points, line=INK, thick=1.5, arrow=True, dashed=False):
        """A line through points, with a head at its end."""
        steps = " L ".join(f"{x} {y}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.add(f'<path d="M {steps}" fill="none" stroke="{line}" stroke-width="{thick}"{dashes}/>')
        if arrow:
            (x1, y1), (x2, y2) = points[-2:]
            angle = round(math.degrees(math.atan2(y2 - y1, x2 - x1)), 1)
            self.add(f'<path d="M 1 0 L -8 -4.5 L -8 4.5 Z" fill="{line}" '
                     f'transform="translate({x2} {y2}) rotate({angle})"/>')

    def svg(self) -> str:
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
                f'width="{WIDTH}" height="{self.height}" role="img">')
        title = f"<title>{escape(self.title)}</title>"
        return "\n".join([head, title, *self.parts, "</svg>"]) + "\n"


# ----------------------------------------------------------------------------- the way from prompt to score

LEFT, STATION, GAP, BAND = 20, 180, 22, 128         # four stations in a band, one band a lesson
FLOW = [
    ("generate.py", "prompts -> examples: an LLM writes the training data", YELLOW, [
        ("file", "prompts/",
         ["short-long.brainstorm.txt", "short-long.txt", "values.json, ..."]),
        ("code", "brainstorm()",
         ["step 1: the LLM lists", "tasks, such as “given a", "question, find answers”"]),
        ("code", "ask_for_examples()",
         ["step 2: request_at(i) and", "render() make a message,", "the LLM an example"]),
        ("code", "make_example()",
         ["an answer's JSON becomes", "a line; what is unfit to", "be trained on is rejected"]),
    ]),
    ("train.py", "examples -> adapter: a query's vector moves towards its positive's", BLUE, [
        ("file", "data/english.jsonl",
         ['{"prompt": ..,', ' "query": ..,', ' "pos": [..], "neg": [..]}']),
        ("code", "prepare()",
         ["Q queries, M documents;", "documents_that_count():", "which are no negatives"]),
        ("code", "cached_gradients()",
         ["vectors of all texts;", "info_nce(): the loss; then", "gradients chunk by chunk"]),
        ("file", "runs/demo/",
         ["adapter_model.safetensors", "adapter_config.json", "log.jsonl, ..."]),
    ]),
    ("model.py", "texts -> vectors: the same for queries and documents, training and use", GREEN, [
        ("code", "instruct()",
         ["Instruct: {prompt}", "Query: {text}", "a document stays bare"]),
        ("code", "Embedder.tokenize()",
         ["BOS, text, EOS: the text", "is cut to fit, and EOS", "comes after the cut"]),
        ("code", "Decoder()",
         ["frozen weights and LoRA;", "a position reads what is", "before it: [B, T, D]"]),
        ("code", "pool()",
         ["the state at EOS, which", "has read the whole text,", "at length 1: a vector [D]"]),
    ]),
    ("evaluate.py", "vectors -> scores: eight kinds of task; here retrieval", PURPLE, [
        ("file", "data/mini/Retrieval/",
         ["task.json, qrels/test.tsv", "queries.jsonl", "corpus.jsonl"]),
        ("code", "with_instruction()",
         ["a query carries the task's", "instruction; a document", "does not"]),
        ("code", "score_retrieval()",
         ["the documents nearest to", "each query by cosine;", "metrics.ndcg(): nDCG@10"]),
        ("file", "results/demo.json",
         ["base and trained: a score", "for each task, and their", "average"]),
    ]),
]


def station(number: int) -> int:
    """The x of a station's left side."""
    return LEFT + 12 + number * (STATION + GAP)


def draw_station(picture, x, y, what, name, lines):
    """A file has a folded corner; code is round."""
    height, fold = 84, 14
    if what == "file":
        edge = f"M {x} {y} h {STATION - fold} l {fold} {fold} v {height - fold} h {-STATION} Z"
        picture.add(f'<path d="{edge}" fill="{PAPER}" stroke="{LINE}"/>')
        picture.add(f'<path d="M {x + STATION - fold} {y} v {fold} h {fold}" fill="none" stroke="{LINE}"/>')
    else:
        picture.rectangle(x, y, STATION, height, "#ffffff", INK, 14)
    picture.text(x + 10, y + 21, name, 12.5, bold=True, mono=True, room=STATION - 24)
    for number, line in enumerate(lines):
        picture.note(x + 10, y + 41 + 16 * number, line, room=STATION - 11)


def flow() -> Picture:
    picture = Picture("From prompt to score", 702)
    tops = [50 + number * (BAND + 40) for number in range(len(FLOW))]
    for top, (lesson, idea, colour, stations) in zip(tops, FLOW):
        picture.rectangle(LEFT, top, WIDTH - 2 * LEFT, BAND, colour, "none", 10)
        picture.text(LEFT + 14, top + 22, lesson, 15, bold=True, mono=True)
        picture.text(LEFT + 142, top + 22, idea, 13)
        for number, (what, name, lines) in enumerate(stations):
            draw_station(picture, station(number), top + 34, what, name, lines)
            if number:
                y = top + 34 + 42
                picture.path([(station(number) - GAP, y), (station(number) - 1, y)])

    def middle(number):
        return station(number) + STATION // 2

    below = [top + BAND - 10 for top in tops]            # the lower side of a band's stations
    turn = tops[1] - 20
    picture.path([(middle(3), below[0]), (middle(3), turn), (middle(0), turn), (middle(0), tops[1] + 33)])
    picture.rectangle(335, turn - 11, 180, 22, PAPER, "none")
    picture.text(425, turn + 5, "one JSON line an example", 13, anchor="middle", ink=QUIET)

    picture.path([(middle(2) - 24, below[1]), (middle(2) - 24, tops[2] - 2)])
    picture.text(middle(2) - 32, tops[2] - 14, "texts", 13, anchor="end", ink=QUIET)
    picture.path([(middle(2) + 24, tops[2]), (middle(2) + 24, below[1] + 2)])
    picture.text(middle(2) + 32, tops[2] - 14, "vectors", 13, ink=QUIET)
    picture.path([(middle(3) + 24, below[1]), (middle(3) + 24, tops[2] - 2)])
    picture.text(middle(3) + 16, tops[2] - 14, "adapter", 13, anchor="end", ink=QUIET)

    picture.path([(middle(1), tops[3]), (middle(1), tops[2] + BAND + 2)])
    picture.text(middle(1) + 8, tops[3] - 14, "texts", 13, ink=QUIET)
    picture.path([(middle(2), tops[2] + BAND), (middle(2), tops[3] - 2)])
    picture.text(middle(2) + 8, tops[3] - 14, "vectors", 13, ink=QUIET)
    return picture


# -------------------------------------------------------------------------------------- the cached gradient

CHUNKS = [("#cfe3fb", "#1f6feb"), ("#d8f0dc", "#2da44e"), ("#fdeac1", "#bf8700"), ("#ecdcfb", "#8250df")]
TEXTS = [(92, 88, 80), (74, 70, 66), (56, 52, 46), (38, 30, 24)]         # lengths, the longest first
PANEL = 262


def draw_texts(picture, x, y, faint=()):
    """The batch: texts as bars, their length the number of tokens; a colour a chunk."""
    for number, ((fill, line), lengths) in enumerate(zip(CHUNKS, TEXTS)):
        fill, line = ("#f6f8fa", "#d0d7de") if number in faint else (fill, line)
        for row, length in enumerate(lengths):
            picture.rectangle(x, y + 42 * number + 12 * row, length, 9, fill, line, 2)


def draw_vectors(picture, x, y, faint=(), gradient=False):
    """The vectors, or their gradients: as many rows as texts, all of the same width."""
    for number, (fill, line) in enumerate(CHUNKS):
        fill, line = ("#f6f8fa", "#d0d7de") if number in faint else (fill, line)
        for row in range(3):
            top = y + 42 * number + 12 * row
            picture.rectangle(x, top, 40, 9, fill if not gradient else PAPER, line, 1)
            if gradient:
                picture.path([(x + 4, top + 4.5), (x + 36, top + 4.5)], line, 1.5, arrow=False, dashed=True)


def code(picture, x, y, lines):
    picture.rectangle(x + 8, y, PANEL - 16, 16 * len(lines) + 12, "#f6f8fa", "none", 4)
    for number, line in enumerate(lines):
        picture.text(x + 14, y + 18 + 16 * number, line, 12, mono=True, room=PANEL - 22)


def cached_gradient() -> Picture:
    picture = Picture("The cached gradient: a batch of any size, one chunk's graph in memory", 622)
    titles = ["1. All vectors, without a graph", "2. The gradient of the loss",
              "3. Chunk by chunk, with graph"]
    lefts = [20 + number * (PANEL + 12) for number in range(3)]
    top = 50
    for x, title in zip(lefts, titles):
        picture.rectangle(x, top, PANEL, 340, PAPER, "#d0d7de", 8)
        picture.text(x + 12, top + 24, title, 13, bold=True, room=PANEL - 14)
    y = top + 72

    x = lefts[0]
    picture.note(x + 14, y - 12, "texts")
    draw_texts(picture, x + 14, y)
    for number in range(4):
        picture.path([(x + 108, y + 16 + 42 * number), (x + 204, y + 16 + 42 * number)], LINE)
    picture.rectangle(x + 120, y - 4, 68, 172, GREEN, INK, 10)
    picture.text(x + 154, y + 80, "Decoder", 12, bold=True, anchor="middle", room=70)
    picture.text(x + 154, y + 96, "LoRA", 12, anchor="middle", room=70)
    draw_vectors(picture, x + 208, y)
    picture.note(x + 208, y - 12, "vectors", room=52)
    picture.note(x + 12, y + 190, "The loss needs vectors, no texts.")
    code(picture, x, y + 202, ["with torch.no_grad():",
                               "  v = [embed(c) for c in chunks]",
                               "vectors = torch.cat(v)"])

    x = lefts[1]
    picture.note(x + 14, y - 12, "vectors")
    draw_vectors(picture, x + 14, y)
    picture.path([(x + 60, y + 62), (x + 84, y + 62)])
    picture.rectangle(x + 88, y + 30, 78, 64, BLUE, INK, 10)
    picture.text(x + 127, y + 58, "info_nce", 12, bold=True, mono=True, anchor="middle", room=78)
    picture.text(x + 127, y + 76, "one loss", 12, anchor="middle", room=78)
    picture.path([(x + 168, y + 62), (x + 200, y + 62)], STRONG_RED, dashed=True)
    picture.note(x + 127, y + 116, "every query with", anchor="middle", room=130)
    picture.note(x + 127, y + 132, "every document", anchor="middle", room=130)
    draw_vectors(picture, x + 208, y, gradient=True)
    picture.note(x + 254, y - 12, "their gradients", anchor="end", room=130)
    picture.note(x + 12, y + 190, "The decoder is not in this small graph.")
    code(picture, x, y + 202, ["gradient = torch.autograd.grad(",
                               "    loss(vectors), vectors)[0]",
                               "# [N, D]"])

    x = lefts[2]
    others = (0, 2, 3)
    picture.note(x + 14, y - 12, "texts")
    draw_texts(picture, x + 14, y, others)
    picture.rectangle(x + 120, y - 4, 68, 172, GREEN, INK, 10)
    picture.text(x + 154, y + 98, "Decoder", 12, bold=True, anchor="middle", room=70)
    picture.text(x + 154, y + 114, "LoRA", 12, anchor="middle", room=70)
    picture.text(x + 154, y + 130, ".grad +=", 12, bold=True, mono=True, ink=STRONG_RED, anchor="middle",
                 room=68)
    draw_vectors(picture, x + 208, y, others, gradient=True)
    picture.note(x + 254, y - 12, "its gradient", anchor="end", room=100)
    picture.path([(x + 96, y + 50), (x + 202, y + 50)], CHUNKS[1][1])
    picture.path([(x + 204, y + 70), (x + 154, y + 70), (x + 154, y + 84)], STRONG_RED, dashed=True)
    picture.note(x + 12, y + 190, "Chunk 2's turn: then its graph goes.")
    code(picture, x, y + 202, ["parts = gradient.split(sizes)",
                               "for c, g in zip(chunks, parts):",
                               "    embed(c).backward(g)"])

    draw_memory(picture, lefts, 414)
    return picture


def draw_memory(picture, lefts, top):
    """Memory over the step: the teeth are as high as one chunk's graph, however many chunks there are."""
    right, base = lefts[2] + PANEL, top + 174
    tooth, forward, row = 30, 10, 1.5                      # a chunk's graph, a pass without, its vectors
    whole = base - 6 - 4 * tooth
    picture.text(20, top + 18, "Memory of a step, from its start to its end (a sketch)", 14, bold=True)
    picture.path([(20, whole), (right, whole)], STRONG_RED, 1.5, arrow=False, dashed=True)
    picture.text(28, whole - 7, "what one graph of the whole batch would take: it grows with the batch", 13,
                 ink=STRONG_RED)
    level = base - 6
    points = [(lefts[0], base), (lefts[0], level)]
    for number in range(4):
        x = lefts[0] + 10 + 62 * number
        points += [(x, level), (x, level - forward), (x + 50, level - forward)]
        level -= row                                       # of a chunk its vectors stay
        points += [(x + 50, level)]
    x = lefts[1] + 60
    points += [(x, level), (x, level - forward), (x + 130, level - forward)]
    level -= 4 * row                                       # the scores go, the gradients stay
    points += [(x + 130, level)]
    for number in range(4):
        x = lefts[2] + 6 + 63 * number
        points += [(x, level), (x + 28, level - tooth), (x + 56, level)]
    points += [(right, level), (right, base)]
    polygon = " ".join(f"{x},{y}" for x, y in points)
    picture.add(f'<polygon points="{polygon}" fill="#cfe3fb" stroke="{STRONG_BLUE}" stroke-width="1.5"/>')
    picture.note(lefts[0] + 8, base - 48, "forward only: a layer's states")
    picture.note(lefts[0] + 8, base - 33, "go as soon as they are read")
    picture.note(lefts[1] + 60, base - 33, "Q × M scores")
    picture.note(lefts[2] + 8, base - 78, "one chunk's graph at a time:", room=PANEL)
    picture.note(lefts[2] + 8, base - 63, "more chunks, no more memory")
    for x, words in zip(lefts, ("1. vectors", "2. gradient of the loss", "3. again, chunk by chunk")):
        picture.text(x, base + 20, words, 12)


# --------------------------------------------------------------------------------------- the score matrix

TEAM, PASSAGE = "Name the team that answers it", "Find a passage that answers it"
BATCH = [
    {"prompt": TEAM, "query": "I was charged twice.", "pos": ["billing"], "neg": ["shipping"]},
    {"prompt": TEAM, "query": "My card was declined.", "pos": ["billing"], "neg": ["sales"]},
    {"prompt": TEAM, "query": "Where is my parcel?", "pos": ["shipping"], "neg": ["billing"]},
    {"prompt": PASSAGE, "query": "how to brew tea", "pos": ["Steep it three minutes."],
     "neg": ["Tea came from China."]},
    {"prompt": PASSAGE, "query": "how to brew tea", "pos": ["Use boiling water."],
     "neg": ["I like mine with milk."]},
]


def small_batch() -> tuple[list[tuple[str, str]], train.Batch]:
    """BATCH as a step of train.py has it -> (instruction, text) of its N texts; the Batch with the mask."""
    seen = []

    def tokenize(texts, prompts):                            # notes the texts; ids are of no interest
        seen.extend(zip(prompts, texts))
        return [[0]] * len(texts)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "batch.jsonl"
        write_jsonl(file, BATCH)
        args = train.options(["--base", "any", "--data", str(file), "--out", "any"])
        batch = train.prepare(Examples([str(file)]), range(len(BATCH)), tokenize, args, step=0)
    texts = [None] * batch.text_count
    for index, text in zip(batch.indices.tolist(), seen):
        texts[index] = text
    return texts, batch


def why_masked(query: int, column: int, positives: list[str], documents: list[str]) -> str:
    """The letter of a masked cell's reason, as the notes have it."""
    if documents[column] != positives[query]:
        return "c"                                           # known from another line of the same query
    return "a" if column < len(positives) else "b"


NOTES = [
    ("a", "The same text as its own positive: another query of the batch has the same label."),
    ("b", "The same text again, as another query's hard negative. For its own query it counts."),
    ("c", "Another line has the same instruction and query, and calls this document its positive."),
]


CELL, ROW = 46, 44                                           # a cell's width and height
CORNER = 252, 200                                            # of the first


def column_x(column: int, Q: int) -> int:
    """The left side of a column. Between positives and hard negatives is a gap."""
    return CORNER[0] + column * CELL + (8 if column >= Q else 0)


def draw_cell(picture, x, y, width, height, kind, word=""):
    fill = {"target": STRONG_BLUE, "own": RED, "other": "#f6f8fa", "masked": PAPER}[kind]
    picture.rectangle(x + 1, y + 1, width - 2, height - 2, fill, STRONG_RED if kind == "own" else LINE, 3)
    if kind == "masked":                                     # hatched
        for share in (0.25, 0.5, 0.75, 1):
            points = [(x + 2, y + share * height - 1), (x + share * width - 1, y + 2)]
            picture.path(points, "#d0d7de", arrow=False)
        for share in (0.25, 0.5, 0.75):
            points = [(x + share * width, y + height - 2), (x + width - 2, y + share * height)]
            picture.path(points, "#d0d7de", arrow=False)
    if word:
        ink = PAPER if kind == "target" else INK
        middle = x + width / 2
        if kind == "masked":                                 # the letter on clean paper
            picture.rectangle(middle - 8, y + height / 2 - 9, 16, 18, PAPER, "none", 8)
        picture.text(middle, y + height / 2 + 5, word, bold=True, ink=ink, anchor="middle", room=width)


def draw_row(picture, row, positives, documents, valid):
    """A query's cells. valid [M]: which documents count for it."""
    Q = len(positives)
    for column, counts in enumerate(valid):
        kind, word = "other", ""
        if not counts:
            kind, word = "masked", why_masked(row, column, positives, documents)
        elif column == row:
            kind, word = "target", "own"
        elif column == row + Q:                              # here each query has one hard negative
            kind = "own"
        draw_cell(picture, column_x(column, Q), CORNER[1] + row * ROW, CELL, ROW, kind, word)


def score_matrix() -> Picture:
    texts, batch = small_batch()
    Q, valid = batch.query_count, batch.valid.tolist()
    queries, documents = texts[:Q], [text for _, text in texts[Q:]]
    M, right = len(documents), CORNER[0] + len(documents) * CELL + 20
    picture = Picture("The scores of a batch: each query with every document", 660)
    picture.note(20, 56, "A small batch, five examples; in each cell stands cos(query, document) / 0.02.")
    picture.note(20, CORNER[1] - 10, "queries and their instructions")
    for column, text in enumerate(documents):
        picture.text(column_x(column, Q) + 28, CORNER[1] - 8, text, 13, turn=-48)
    for row, (instruction, query) in enumerate(queries):
        y = CORNER[1] + row * ROW
        picture.text(20, y + 19, query, 14, bold=True, room=CORNER[0] - 20)
        picture.note(20, y + 36, instruction, room=CORNER[0] - 20)
        draw_row(picture, row, documents[:Q], documents, valid[row])
        count = sum(valid[row])
        picture.text(right, y + 19, f"{count} of {M}")
        picture.note(right, y + 36, f"log {count} = {math.log(count):.2f}")

    bottom = CORNER[1] + Q * ROW
    for first, last, words in ((0, Q, "positives, in order"), (Q, M, "hard negatives")):
        x1, x2 = column_x(first, Q), column_x(last - 1, Q) + CELL - 2
        bracket = [(x1, bottom + 6), (x1, bottom + 12), (x2, bottom + 12), (x2, bottom + 6)]
        picture.path(bracket, QUIET, 1, arrow=False)
        picture.text((x1 + x2) / 2, bottom + 29, words, 12, anchor="middle", room=x2 - x1)
    for line, words in enumerate(("count as its", "documents; the", "chance_loss")):
        picture.note(right, bottom + 16 + 15 * line, words)

    x, y = 20, bottom + 66
    for kind, words in (("target", "own: its positive"), ("own", "its hard negative"),
                        ("other", "another query's document"), ("masked", "masked: not counted")):
        draw_cell(picture, x, y, 22, 22, kind)
        picture.text(x + 29, y + 16, words)
        x += 47 + 7.8 * len(words)
    y += 54
    for letter, words in NOTES:
        picture.text(20, y, letter, bold=True)
        picture.text(38, y, words)
        y += 20
    picture.rectangle(20, y + 8, WIDTH - 40, 34, BLUE, "none", 6)
    formula = "-log( exp(its positive's score) / the row's sum of exp(score) without masked cells )"
    picture.text(32, y + 30, "loss of a query  =  " + formula)
    return picture


# --------------------------------------------------------------------------------------------- the files

PICTURES = {"flow": flow, "cached_gradient": cached_gradient, "score_matrix": score_matrix}


def main(argv=None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder (default: pictures)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        write_text(args.out / f"{name}.svg", draw().svg())
        print(args.out / f"{name}.svg")


if __name__ == "__main__":
    command(main)
