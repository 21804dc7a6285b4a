"""results.png: a bar a row, as long as the part of the machine's limit that it reaches, with the peer's below it.

Drawn with PIL alone, three times as large and then made smaller, which smooths the edges.
"""

from PIL import Image, ImageDraw, ImageFont

SCALE = 3
WIDTH, MARGIN = 1200, 40
ROW, BAR, TOP, BOTTOM = 62, 15, 128, 84
BARS, BARS_END = 320, 800  # where a bar begins, and where the limit is
RATIO, MEMORY = 850, 985
INK, SOFT, TRACK, RULE = "#1d2433", "#6b7485", "#eef1f5", "#d9dee6"
OURS, PEER = "#2563c9", "#e39a3b"


class Canvas:
    """A picture in units of its final pixels."""

    def __init__(self, width, height):
        self.size = width, height
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x, y, text, size=14, fill=INK, anchor="lm"):
        font = ImageFont.load_default(size * SCALE)
        self.pen.text((x * SCALE, y * SCALE), text, font=font, fill=fill, anchor=anchor)
        return self.pen.textlength(text, font=font) / SCALE

    def bar(self, left, top, right, height, fill):
        right = max(right, left + 2)  # what is there is seen
        box = [left * SCALE, top * SCALE, right * SCALE, (top + height) * SCALE]
        self.pen.rounded_rectangle(box, radius=min(3, (right - left) / 2) * SCALE, fill=fill)

    def line(self, x, top, bottom, fill):
        self.pen.line([x * SCALE, top * SCALE, x * SCALE, bottom * SCALE], fill=fill, width=SCALE)

    def smaller(self):
        return self.image.resize(self.size, Image.Resampling.LANCZOS)


def draw(rows, title):
    """rows as in results.json → a PIL picture."""
    height = TOP + ROW * len(rows) + BOTTOM
    canvas = Canvas(WIDTH, height)
    canvas.text(MARGIN, 38, "Mini DALL-E: speed", 24)
    canvas.text(MARGIN, 68, title, 13, SOFT)
    for x, text in ((BARS, "speed (longer is faster)"), (RATIO, "times the peer"), (MEMORY, "peak memory")):
        canvas.text(x, TOP - 22, text, 12, SOFT)
    canvas.text(BARS_END, TOP - 22, "limit", 12, SOFT, anchor="rm")
    most = max(side["peak_memory_mb"] for row in rows for side in (row["ours"], row["peer"]) if side)
    for place, row in enumerate(rows):
        one_row(canvas, row, TOP + place * ROW, most)
    legend(canvas, height - BOTTOM / 2, rows)
    return canvas.smaller()


def one_row(canvas, row, top, most_memory):
    canvas.pen.line([MARGIN * SCALE, top * SCALE, (WIDTH - MARGIN) * SCALE, top * SCALE], fill=RULE, width=SCALE)
    middle = top + ROW / 2
    canvas.text(MARGIN, middle - 9, row["what"], 15)
    canvas.text(MARGIN, middle + 11, limit_in_words(row), 11, SOFT)
    sides = [(row["ours"], OURS)] + ([(row["peer"], PEER)] if row["peer"] else [])
    first = middle - (BAR * len(sides) + 4 * (len(sides) - 1)) / 2
    longest = length_of_limit(row)
    for place, (side, colour) in enumerate(sides):
        y = first + place * (BAR + 4)
        if row["limit"]:
            canvas.bar(BARS, y, BARS_END, BAR, TRACK)
        end = BARS + (BARS_END - BARS) * min(1.0, speed(side["median"], row["unit"]) / longest)
        canvas.bar(BARS, y, end, BAR, colour)
        words = f"{figure(side['median'])} {row['unit']}"
        colour_of_words, anchor, x = ("white", "rm", end - 7) if end - BARS > 130 else (INK, "lm", end + 7)
        canvas.text(x, y + BAR / 2 + 0.5, words, 11, colour_of_words, anchor)
        memory_end = MEMORY + (WIDTH - MARGIN - 62 - MEMORY) * side["peak_memory_mb"] / most_memory
        canvas.bar(MEMORY, y, memory_end, BAR, colour)
        canvas.text(memory_end + 6, y + BAR / 2 + 0.5, memory(side["peak_memory_mb"]), 11)
    if row["limit"]:
        canvas.line(BARS_END, first - 4, first + len(sides) * (BAR + 4), INK)
    if row["ratio"]:
        canvas.text(RATIO, middle, figure(row["ratio"]), 24, OURS if row["ratio"] >= 1 else PEER)


def speed(value, unit):
    """Samples a second, whichever way the row counts."""
    return 1 / value if unit.startswith("s/") else value


def length_of_limit(row):
    """The speed that a whole bar stands for: the limit or, where there is none, a little more than the faster side."""
    if row["limit"]:
        return speed(row["limit"], row["unit"])
    return 1.25 * max(speed(side["median"], row["unit"]) for side in (row["ours"], row["peer"]) if side)


def limit_in_words(row):
    if not row["limit"]:
        return "no limit known"
    return f"{100 * row['of_limit']:.0f} % of the limit: {row['limit_is']}"


def legend(canvas, y, rows):
    x = MARGIN
    names = sorted({row["peer_name"] for row in rows if row["peer"]})
    for colour, name in [(OURS, "here")] + ([(PEER, "peer: " + ", ".join(names))] if names else []):
        canvas.bar(x, y - 6, x + 12, 12, colour)
        x += 20 + canvas.text(x + 18, y, name, 12) + 22
    canvas.text(WIDTH - MARGIN, y, "medians; the limit was measured beside each row", 12, SOFT, anchor="rm")


def figure(value):
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def memory(megabytes):
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 1000 else f"{megabytes:.0f} MB"
