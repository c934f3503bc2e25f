/**
 * QR codes, as ISO/IEC 18004 describes them: text as bytes in UTF-8, error correction level M (15 % of a code may be
 * covered), versions 1 to 13, which take 331 bytes. A code is a square of modules, `true` for dark ones; rows first.
 *     document.querySelector("img").src = `data:image/svg+xml,${encodeURIComponent(qrSvg(qrCode("https://example.org")))}`;
 */

/** Codewords of correction in each block, and the number of blocks, at level M; the first is version 1. */
const CORRECTION = [10, 16, 26, 18, 24, 16, 18, 22, 22, 26, 30, 22, 22];
const BLOCKS = [1, 1, 1, 2, 2, 4, 4, 4, 5, 5, 5, 8, 9]; // versions above 13 also have alignment patterns that `alignments` lacks
const QUIET = 4; // light modules that a reader wants around a code
const BYTE_MODE = 0b0100;
const PADDING = [0xec, 0x11];
const LEVEL_M = 0b00;

/** Whether a mask inverts the data module in a row and column. */
const MASKS: ((y: number, x: number) => boolean)[] = [
  (y, x) => (y + x) % 2 === 0,
  (y) => y % 2 === 0,
  (_, x) => x % 3 === 0,
  (y, x) => (y + x) % 3 === 0,
  (y, x) => (Math.floor(y / 2) + Math.floor(x / 3)) % 2 === 0,
  (y, x) => ((y * x) % 2) + ((y * x) % 3) === 0,
  (y, x) => (((y * x) % 2) + ((y * x) % 3)) % 2 === 0,
  (y, x) => (((y + x) % 2) + ((y * x) % 3)) % 2 === 0,
];

/** @throws if the text is too long */
export function qrCode(text: string): boolean[][] {
  const bytes = new TextEncoder().encode(text);
  for (const [i, blocks] of BLOCKS.entries()) {
    const version = i + 1;
    const correction = CORRECTION[i]!;
    const { modules, free } = frame(version);
    const codewordsInAll = Math.floor(free.length / 8);
    const data = dataCodewords(bytes, version, codewordsInAll - correction * blocks);
    if (data === undefined) continue;
    const codewords = interleave(data, correction, blocks);
    free.forEach(([y, x], i) => (modules[y]![x] = bitOf(codewords[i >> 3] ?? 0, 7 - (i & 7)))); // the last few stay light
    return bestMasked(modules, free, version);
  }
  throw new Error(`A text of ${bytes.length} bytes is too long for a QR code`);
}

/** An SVG of a code, one unit a module, with the quiet zone around it. Dark on light whatever the page's colours are. */
export function qrSvg(modules: boolean[][]): string {
  const size = modules.length + 2 * QUIET;
  const path = modules.flatMap((row, y) => row.map((dark, x) => (dark ? `M${x + QUIET} ${y + QUIET}h1v1h-1z` : ""))).join("");
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${size} ${size}" shape-rendering="crispEdges">` +
    `<path fill="#fff" d="M0 0h${size}v${size}H0z"/><path d="${path}"/></svg>`
  );
}

/** The patterns that are the same in every code of a version, and the other modules in the order in which data fills them. */
function frame(version: number) {
  const size = 17 + 4 * version;
  const modules = Array.from({ length: size }, () => Array<boolean>(size).fill(false));
  const taken = Array.from({ length: size }, () => Array<boolean>(size).fill(false));
  const set = (y: number, x: number, dark: boolean) => {
    if (y < 0 || x < 0 || y >= size || x >= size) return;
    modules[y]![x] = dark;
    taken[y]![x] = true;
  };
  /** Concentric squares around a module; `light` says which of them, by their distance from it, are light. */
  const squares = (y: number, x: number, radius: number, light: number[]) => {
    for (let dy = -radius; dy <= radius; dy++) {
      for (let dx = -radius; dx <= radius; dx++) {
        set(y + dy, x + dx, !light.includes(Math.max(Math.abs(dy), Math.abs(dx))));
      }
    }
  };
  for (let i = 0; i < size; i++) {
    set(6, i, i % 2 === 0); // timing
    set(i, 6, i % 2 === 0);
  }
  const far = size - 4;
  squares(3, 3, 4, [2, 4]); // the three finder patterns
  squares(3, far, 4, [2, 4]);
  squares(far, 3, 4, [2, 4]);
  const centres = alignments(version, size);
  for (const y of centres) {
    for (const x of centres) {
      const overFinder = (y === 6 && (x === 6 || x === size - 7)) || (y === size - 7 && x === 6);
      if (!overFinder) squares(y, x, 2, [1]);
    }
  }
  for (const [y, x] of [...formatModules(size).flat(), ...versionModules(version, size).flat()]) set(y, x, false);
  set(size - 8, 8, true);

  const free: [y: number, x: number][] = [];
  let up = true;
  for (let right = size - 1; right > 0; right -= 2, up = !up) {
    if (right === 6) right--; // the column of the timing pattern belongs to no pair
    for (let i = 0; i < size; i++) {
      const y = up ? size - 1 - i : i;
      for (const x of [right, right - 1]) if (!taken[y]![x]) free.push([y, x]);
    }
  }
  return { modules, free };
}

/** Rows and columns in which alignment patterns are centred. */
function alignments(version: number, size: number): number[] {
  if (version === 1) return [];
  return version < 7 ? [6, size - 7] : [6, (size - 1) / 2, size - 7];
}

/** Where the 15 bits of level and mask stand, twice, the lowest bit first. */
function formatModules(size: number): [y: number, x: number][][] {
  return Array.from({ length: 15 }, (_, i) => [
    i < 6 ? [i, 8] : i < 8 ? [i + 1, 8] : [8, i === 8 ? 7 : 14 - i],
    i < 8 ? [8, size - 1 - i] : [size - 15 + i, 8],
  ]);
}

/** Where the 18 bits of the version stand, twice, the lowest bit first. Small codes have none. */
function versionModules(version: number, size: number): [y: number, x: number][][] {
  if (version < 7) return [];
  return Array.from({ length: 18 }, (_, i) => {
    const [long, short] = [Math.floor(i / 3), size - 11 + (i % 3)];
    const place: [number, number] = [long, short];
    return [place, [short, long]];
  });
}

/** Mode, length, bytes and padding; undefined if they are more than `room` codewords. */
function dataCodewords(bytes: Uint8Array, version: number, room: number): number[] | undefined {
  const lengthBytes = version < 10 ? 1 : 2;
  if (bytes.length + lengthBytes + 1 > room) return undefined; // the mode and the end of the text are half a codeword each
  const length = lengthBytes === 1 ? [bytes.length] : [bytes.length >> 8, bytes.length & 255];
  const codewords: number[] = [];
  let half = BYTE_MODE; // so each byte straddles two codewords
  for (const byte of [...length, ...bytes, 0]) {
    codewords.push((half << 4) | (byte >> 4));
    half = byte & 15;
  }
  while (codewords.length < room) codewords.push(PADDING[(codewords.length - bytes.length - lengthBytes - 1) % 2]!);
  return codewords;
}

/** Cuts data into blocks, the last ones longer by one if need be, and takes from each in turn; then the same of their correction. */
function interleave(data: number[], correction: number, blocks: number): number[] {
  const short = Math.floor(data.length / blocks);
  const longer = data.length % blocks;
  let at = 0;
  const parts = Array.from({ length: blocks }, (_, i) => data.slice(at, (at += short + (i < blocks - longer ? 0 : 1))));
  const corrections = parts.map((part) => correctionOf(part, correction));
  const inTurn = (lists: number[][]) =>
    Array.from({ length: Math.max(...lists.map((list) => list.length)) }, (_, i) =>
      lists.flatMap((list) => list.slice(i, i + 1)),
    );
  return [...inTurn(parts), ...inTurn(corrections)].flat();
}

/** Product in the field of 256 elements, whose polynomial is x⁸ + x⁴ + x³ + x² + 1. */
function multiply(a: number, b: number): number {
  let product = 0;
  for (; b > 0; b >>= 1) {
    if (b & 1) product ^= a;
    a = a & 128 ? (a << 1) ^ 0x11d : a << 1;
  }
  return product;
}

/** Reed-Solomon: the remainder of the data, as a polynomial, by the one whose roots are 2⁰, 2¹, … 2ⁿ⁻¹. */
function correctionOf(data: number[], count: number): number[] {
  let divisor = [1]; // highest power first
  for (let i = 0, root = 1; i < count; i++, root = multiply(root, 2)) {
    divisor = [...divisor, 0].map((factor, j) => factor ^ multiply(divisor[j - 1] ?? 0, root));
  }
  const rest = [...data, ...Array<number>(count).fill(0)];
  for (let i = 0; i < data.length; i++) {
    const lead = rest[i]!;
    divisor.forEach((factor, j) => (rest[i + j]! ^= multiply(factor, lead)));
  }
  return rest.slice(data.length);
}

/** A number followed by its remainder, so that a reader can repair it. */
function withRemainder(value: number, divisor: number, bits: number): number {
  let rest = value << bits;
  for (let i = 31 - Math.clz32(rest); i >= bits; i--) if (bitOf(rest, i)) rest ^= divisor << (i - bits);
  return (value << bits) | rest;
}

/** Writes level, mask and version, and inverts data by the mask that leaves the code easiest to read. */
function bestMasked(modules: boolean[][], free: [y: number, x: number][], version: number): boolean[][] {
  const size = modules.length;
  const candidates = MASKS.map((mask, number) => {
    const masked = modules.map((row) => [...row]);
    for (const [y, x] of free) if (mask(y, x)) masked[y]![x] = !masked[y]![x];
    const format = withRemainder((LEVEL_M << 3) | number, 0x537, 10) ^ 0x5412;
    write(masked, formatModules(size), format);
    write(masked, versionModules(version, size), withRemainder(version, 0x1f25, 12));
    return { masked, penalty: penalty(masked) };
  });
  return candidates.reduce((best, next) => (next.penalty < best.penalty ? next : best)).masked;
}
function write(modules: boolean[][], places: [y: number, x: number][][], value: number): void {
  places.forEach((copies, bit) => copies.forEach(([y, x]) => (modules[y]![x] = bitOf(value, bit))));
}
function bitOf(value: number, bit: number): boolean {
  return ((value >> bit) & 1) === 1;
}

/** What makes a code hard to read: long runs, blocks, what looks like a finder pattern, and too much of one colour. */
function penalty(modules: boolean[][]): number {
  const size = modules.length;
  const columns = modules.map((_, x) => modules.map((row) => row[x]));
  let sum = 0;
  let dark = 0;
  for (const line of [...modules, ...columns]) {
    const text = line.map(Number).join("");
    for (const [run] of text.matchAll(/0{5,}|1{5,}/g)) sum += run.length - 2;
    sum += 40 * [...text.matchAll(/(?=10111010000|00001011101)/g)].length;
  }
  modules.forEach((row, y) =>
    row.forEach((module, x) => {
      if (module) dark++;
      const block = [row[x + 1], modules[y + 1]?.[x], modules[y + 1]?.[x + 1]];
      if (block.every((other) => other === module)) sum += 3;
    }),
  );
  return sum + 10 * Math.floor(Math.abs((dark / size ** 2) * 100 - 50) / 5);
}
