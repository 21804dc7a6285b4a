/** The large view: one image of a list, the settings that made it, and what the user can do with it. */

const NAMES = { seed: "Seed", temperature: "Temperature", top_k: "Top-k", top_p: "Top-p", cond_scale: "Guidance",
  kept_rows: "Rows kept", checkpoint: "Checkpoint" };
const SWIPE = 40; // pixels

const $ = (id) => document.getElementById(id);
let images = [];
let place = 0;

/** Return the file name of an image. */
export const fileName = ({ seed }) => `mini-dalle-seed-${String(seed).replace(/\D/g, "")}.png`;

/** Show list[index] large. actions: functions of an image: vary, resume, reuse, and link, which returns its address. */
export function openViewer(list, index, actions) {
  [images, place] = [list, index];
  for (const name of ["vary", "resume", "reuse"]) {
    $(name).onclick = () => {
      $("viewer").close();
      actions[name](images[place]);
    };
  }
  $("copy_seed").onclick = () => copy(images[place].seed, "Seed copied.");
  $("copy_link").onclick = () => copy(actions.link(images[place]), "Link copied.");
  step(0);
  $("viewer").showModal();
}

function step(by) {
  place = (place + by + images.length) % images.length;
  const { url, prompt, metadata } = images[place];
  Object.assign($("large"), { src: url, alt: prompt });
  Object.assign($("download"), { href: url, download: fileName(images[place]) });
  $("place").textContent = `Image ${place + 1} of ${images.length}`;
  $("caption").textContent = prompt;
  $("facts").replaceChildren();
  for (const [key, name] of Object.entries(NAMES)) {
    if (metadata[key] == null) continue;
    $("facts").appendChild(document.createElement("dt")).textContent = name;
    $("facts").appendChild(document.createElement("dd")).textContent = metadata[key];
  }
  $("copy_link").hidden = metadata.kept_rows != null; // a link does not carry the image that this one continues
  $("copied").textContent = "";
}

async function copy(text, sentence) {
  try {
    await navigator.clipboard.writeText(text);
    $("copied").textContent = sentence;
  } catch {
    window.prompt("Copy this text:", text); // without HTTPS browsers keep the clipboard to themselves
  }
}

$("previous").onclick = () => step(-1);
$("next").onclick = () => step(1);
$("close").onclick = () => $("viewer").close();
$("viewer").onclick = ({ target }) => target === $("viewer") && $("viewer").close(); // a click next to the content
$("viewer").onkeydown = ({ key }) => step({ ArrowLeft: -1, ArrowRight: 1 }[key] ?? 0);
let swipeFrom = 0;
$("large").onpointerdown = ({ clientX }) => (swipeFrom = clientX);
$("large").onpointerup = ({ clientX }) => Math.abs(clientX - swipeFrom) > SWIPE && step(clientX < swipeFrom ? 1 : -1);
