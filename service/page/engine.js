/**
 * The engine: where images come from. This one asks the server, and no other file of the page knows the server's API.
 * Another engine exports the same functions: model, describe, generate and signIn. Errors have a sentence for the user
 * as their message, and as status the HTTP status of the answer, or 0.
 */

const RECONNECTIONS = 5; // to an event stream that breaks, before the generation counts as failed
const failure = (sentence, status = 0) => Object.assign(new Error(sentence), { status });

/** Send this access token with every further request of this tab. Tokens are ASCII; fetch() throws at other headers. */
export const signIn = (token) => sessionStorage.setItem("token", token.replace(/[^\x20-\x7e]/g, "?"));

/** Return the model's name, limits, recommended settings and example prompts. */
export const model = async () => (await ask("api/model")).json();

/** Return {tokens, unknown_words} of one prompt. */
export async function describe(prompt) {
  const answer = await ask(`api/model?${new URLSearchParams({ prompt })}`);
  return (await answer.json()).prompt;
}

/**
 * Generate images and return them as [{index, prompt, seed, blob, metadata}], in the order in which they finished.
 * request: {prompts, num_images, seed, temperature, top_k, top_p, cond_scale, image (Blob or null), keep_rows}.
 * onProgress(type, event): "queued" {ahead}, "row" {index, rows, of, preview (URL or null), seconds_left}, "image".
 * signal (AbortSignal) stops the generation; the images finished until then are returned.
 */
export async function generate(request, onProgress, signal) {
  const body = JSON.stringify({ ...request, image: request.image && (await toBase64(request.image)) });
  const { id } = await (await ask("api/jobs", { method: "POST", body })).json();
  const images = [];
  try {
    for await (const { type, data } of events(id, signal)) {
      if (type === "done" && data.cancelled && !signal.aborted) {
        throw failure("The connection broke, so the server cancelled the rest.");
      }
      if (type === "done") return images;
      if (type === "error") throw failure(data.error, 500);
      if (type === "row" && data.preview) data.preview = `data:image/webp;base64,${data.preview}`;
      if (type === "image") images.push({ ...data, png: null, blob: toBlob(data.png) });
      onProgress(type, type === "image" ? images.at(-1) : data);
    }
  } catch (error) {
    ask(`api/jobs/${id}`, { method: "DELETE", keepalive: true }).catch(() => {}); // it may have ended already
    if (!signal.aborted) throw error;
  }
  return images;
}

/** Yield {type, data} for each event of a job; reconnect if the stream breaks. */
async function* events(id, signal) {
  let last = "";
  for (let failures = 0; failures <= RECONNECTIONS; failures++) {
    try {
      const { body } = await ask(`api/jobs/${id}/events`, { headers: last && { "Last-Event-ID": last }, signal });
      const reader = body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (let part = await reader.read(); !part.done; part = await reader.read()) {
        const blocks = (text + part.value).split(/\r?\n\r?\n/);
        text = blocks.pop();
        for (const block of blocks) {
          const field = (name) => block.match(new RegExp(`^${name}: ?(.*)$`, "m"))?.[1];
          if (!field("data")) continue; // a comment that keeps the connection open
          [last, failures] = [field("id"), 0];
          yield { type: field("event"), data: JSON.parse(field("data")) };
        }
      }
    } catch (error) {
      if (signal.aborted || (error.status && error.status < 500)) throw error; // a proxy's 502 may pass
    }
    await new Promise((resolve) => setTimeout(resolve, 400 * (failures + 1)));
  }
  throw failure("The connection to the server was lost.");
}

async function ask(url, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = { "Content-Type": "application/json", ...options.headers };
  if (token) headers.Authorization = `Bearer ${token}`;
  const answer = await fetch(url, { ...options, headers }).catch((error) => {
    throw options.signal?.aborted ? error : failure("The server does not answer.");
  });
  if (answer.ok) return answer;
  const { error } = await answer.json().catch(() => ({}));
  throw failure(error ?? `The server refused with status ${answer.status}.`, answer.status);
}

const toBase64 = (blob) => new Promise((resolve, reject) => {
  const onload = ({ target }) => resolve(target.result.split(",")[1]);
  Object.assign(new FileReader(), { onload, onerror: reject }).readAsDataURL(blob);
});

function toBlob(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: "image/png" });
}
