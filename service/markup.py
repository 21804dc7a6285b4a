"""The page's parts as HTML: status line, grid, chosen picture, history. Every text of the user's is escaped here."""

import base64
import html
import io

# What a click on a picture tells the page; its place is written on the button around it.
CLICKS = """element.addEventListener('click', event => {
  const tile = event.target.closest('[data-place]');
  if (tile) trigger('select', {place: Number(tile.dataset.place)});
});"""
CHOSEN = """element.addEventListener('click', event => {
  if (event.target.closest('.vary')) trigger('click');
});
watch('value', () => {
  if (element.querySelector('.chosen')) element.scrollIntoView({block: 'nearest', behavior: 'smooth'});
});"""
NAMES = {
    "seed": "Seed",
    "temperature": "Temperature",
    "top_k": "Top-k",
    "top_p": "Top-p",
    "cond_scale": "Guidance",
    "kept_rows": "Rows kept",
    "checkpoint": "Checkpoint",
}
SMALL = 128**2  # pixels, up to which a PNG is small enough
HINT = "Write a sentence and press Enter."
NOTHING = f'<div class="nothing"><p>{HINT}</p></div>'


def data_url(bytes, kind):
    return f"data:image/{kind};base64,{base64.b64encode(bytes).decode()}"


def small(image, side=None):
    """A PIL picture as a data URL that is quick to send; side: at most so many pixels."""
    if side is not None and max(image.size) > side:
        image = image.resize((side * image.width // max(image.size), side * image.height // max(image.size)))
    kind = "png" if image.width * image.height <= SMALL else "jpeg"
    file = io.BytesIO()
    image.save(file, kind, **({} if kind == "png" else {"quality": 88, "subsampling": 0}))
    return data_url(file.getvalue(), kind)


def said(text, done=None):
    """The status line; done: share of the work, for the bar under it."""
    bar = ""
    if done is not None:
        percent = round(100 * done)
        bar = (
            f'<div class="bar" role="progressbar" aria-label="drawing" aria-valuemin="0" aria-valuemax="100" '
            f'aria-valuenow="{percent}"><div style="width: {percent}%"></div></div>'
        )
    return f'<p class="said" role="status">{html.escape(text)}</p>{bar}'


def wrong(sentence):
    return f'<p class="said wrong" role="alert">{html.escape(sentence)}</p>'


def progress(job, others, rows):
    """The status line of a job that is being drawn."""
    total = len(job.pictures)
    if not job.started:
        wait = f"{others} other {'request is' if others == 1 else 'requests are'} being served"
        return said(f"Waiting: {wait}." if others else "Starting …", 0)
    at = f"Drawing, row {min(job.row + 1, rows)} of {rows}" if job.drawing else "Drawing"
    if job.done:
        at += f"; {job.done} of {total} pictures are ready"
    return said(f"{at}.", (job.done + job.drawing * job.row / rows) / total)


def ended(job, seconds):
    """The status line of a job that is over."""
    if job.error:
        return wrong(job.error)
    count = f"{job.done} picture{'' if job.done == 1 else 's'}"
    if job.cancelled:
        return said(f"Stopped; {count} had been drawn." if job.done else "Stopped.")
    return said(f"{count} in {seconds:.1f} seconds. Choose one to see its seed, to vary it or to save it.")


def grid(session, job):
    """The pictures of a page: ready ones can be chosen, those that form are shown, the rest are empty places."""
    tiles = []
    for place, finished in enumerate(session.shown):
        forming = job.forming.get(place) if job else None
        if finished is not None:
            pressed = str(finished is session.chosen).lower()
            tiles.append(
                f'<button type="button" class="tile" data-place="{place}" aria-pressed="{pressed}" '
                f'aria-label="Picture {place + 1}, seed {finished.picture.seed}">'
                f'<img alt="" src="{finished.tile}"></button>'
            )
        elif forming is not None:
            tiles.append(f'<div class="tile forming"><img alt="" src="{small(forming)}"></div>')
        else:
            tiles.append('<div class="tile empty"></div>')
    if not tiles:
        return NOTHING
    return f'<div class="grid n{min(len(tiles), 5)}">{"".join(tiles)}</div>'


def plain(value):
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def chosen(finished):
    """The picture that was clicked, with what it was drawn from and a link that saves it."""
    if finished is None:
        return ""
    picture, about = finished.picture, finished.about
    facts = "".join(
        f"<dt>{name}</dt><dd>{html.escape(plain(about[key]))}</dd>" for key, name in NAMES.items() if key in about
    )
    source = data_url(finished.png, "png")
    return (
        f'<article class="chosen"><img src="{source}" alt="{html.escape(picture.prompt)}"><div>'
        f'<p class="prompt">{html.escape(picture.prompt)}</p><dl>{facts}</dl>'
        '<p class="acts"><button type="button" class="vary" title="Keep its upper half, draw the rest anew">'
        "Vary</button>"
        f'<a href="{source}" download="mini-dalle-seed-{picture.seed}.png">Download</a></p></div></article>'
    )


def history(session):
    """Everything that the page drew, the newest first."""
    if not session.history:
        return ""
    tiles = "".join(
        f'<button type="button" class="tile" data-place="{place}" title="{html.escape(one.picture.prompt)}" '
        f'aria-label="{html.escape(one.picture.prompt)}, seed {one.picture.seed}">'
        f'<img alt="" src="{one.thumbnail}"></button>'
        for place, one in enumerate(session.history)
    )
    return f'<section class="history"><h2>History</h2><div class="strip">{tiles}</div></section>'
