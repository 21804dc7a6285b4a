/** The history: the newest images, kept in this browser's IndexedDB. Without storage the page works, but forgets. */

export const LIMIT = 120; // images

const finished = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

/** Open the store of images and return the result of action(store), or undefined if the browser refuses. */
async function use(action) {
  try {
    const opening = indexedDB.open("mini-dalle", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("images", { keyPath: "id", autoIncrement: true });
    const database = await finished(opening);
    const transaction = database.transaction("images", "readwrite");
    const stored = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
    const result = await finished(action(transaction.objectStore("images")));
    await stored; // a page that is left earlier would lose the change
    database.close();
    return result;
  } catch (error) {
    console.warn("The history is not available:", error);
  }
}

/** Return all images, the newest first. */
export const all = async () => ((await use((store) => store.getAll())) ?? []).reverse();

/** Add an image, and drop the oldest ones beyond the limit. */
export async function add({ prompt, seed, blob, metadata }) {
  const id = await use((store) => store.add({ prompt, seed, blob, metadata }));
  if (id > LIMIT) await use((store) => store.delete(IDBKeyRange.upperBound(id - LIMIT)));
}

/** Forget all images. */
export const clear = () => use((store) => store.clear());
