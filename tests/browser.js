// What the tests of the page note while it runs, and what they do on it beside clicking and typing.
window.violations = [];
window.announced = [];
window.hacked = () => violations.push("a script ran");
addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective + event.blockedURI));
addEventListener("error", (event) => event.message && violations.push(event.message));
addEventListener("unhandledrejection", (event) => violations.push(String(event.reason)));
addEventListener("DOMContentLoaded", () => {
  const status = document.getElementById("status");
  new MutationObserver(() => announced.push(status.textContent)).observe(status, { childList: true });
});

// Drop a file of this name and content, in base64, on the page.
window.drop = (name, text) => {
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(atob(text), (one) => one.charCodeAt(0))], name, { type: "image/png" }));
  for (const type of ["dragover", "drop"]) {
    document.body.dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));
  }
};

// Answer the first request for events like a proxy whose server is away, and note the address of each job.
window.breakFirst = () => {
  const [plain, jobs] = [fetch, (window.jobs = [])];
  window.fetch = async (url, options) => {
    if (url.endsWith("/events") && jobs.push(`/${url.slice(0, -7)}`) === 1) return new Response("", { status: 502 });
    return plain(url, options);
  };
};

// Give the bytes of an image in the history.
window.bytesOf = async (prompt, seed, done) => {
  const history = await import(new URL("static/history.js", document.baseURI));
  const { blob } = (await history.all()).find((image) => image.prompt === prompt && image.seed == seed);
  done(Array.from(new Uint8Array(await blob.arrayBuffer())));
};

// Add an image to the history that has this text wherever it may have some.
window.addImageOf = async (text, done) => {
  const history = await import(new URL("static/history.js", document.baseURI));
  const [one] = await history.all();
  await history.add({ ...one, prompt: text, seed: text, metadata: { seed: text, top_p: text, checkpoint: text } });
  done();
};
