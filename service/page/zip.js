/** ZIP archives without compression: PNG files are compressed already. */

const CRC = Uint32Array.from({ length: 256 }, (_, byte) => {
  for (let bit = 0; bit < 8; bit++) byte = byte & 1 ? (byte >>> 1) ^ 0xedb88320 : byte >>> 1;
  return byte;
});

const crc32 = (bytes) => ~bytes.reduce((crc, byte) => CRC[(crc ^ byte) & 255] ^ (crc >>> 8), -1) >>> 0;

/** Return [value, number of bytes] pairs as little-endian bytes. */
const packed = (...pairs) =>
  Uint8Array.from(pairs.flatMap(([value, size]) => Array.from({ length: size }, (_, i) => value >>> (8 * i))));

/** Return a ZIP archive, as a Blob, of files [{name, blob}]. */
export async function zip(files) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const file of files) {
    const name = new TextEncoder().encode(file.name);
    const bytes = new Uint8Array(await file.blob.arrayBuffer());
    // Version 2.0, names in UTF-8, stored, 1 January 1980; then checksum, both sizes and the lengths of name and extras.
    const sizes = [[crc32(bytes), 4], [bytes.length, 4], [bytes.length, 4], [name.length, 2], [0, 2]];
    const common = packed([20, 2], [0x800, 2], [0, 2], [0, 2], [33, 2], ...sizes);
    const local = [packed([0x04034b50, 4]), common, name, bytes];
    parts.push(...local);
    directory.push(packed([0x02014b50, 4], [20, 2]), common, packed([0, 2], [0, 2], [0, 2], [0, 4], [offset, 4]), name);
    offset += local.reduce((sum, part) => sum + part.length, 0);
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0);
  const count = [files.length, 2];
  const end = packed([0x06054b50, 4], [0, 2], [0, 2], count, count, [size, 4], [offset, 4], [0, 2]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}
