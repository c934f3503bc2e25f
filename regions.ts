/**
 * Room codes, and the regions that they name.
 *
 * A code is six characters of Bitcoin's base58 alphabet: 35 bits, big-endian. On a machine that knows its region the top 5 bits
 * are the region's position in the table below and 30 are random; elsewhere all 35 are random.
 */

/**
 * The regions in the order of their positions.
 *
 * Append only: a position that was issued once keeps its meaning, because codes of it are on people's screens.
 * A code has 5 bits for the position, so 32 rows are the most there can be.
 */
export const REGIONS: readonly string[] = [
  "ams", // Amsterdam
  "arn", // Stockholm
  "bom", // Mumbai
  "cdg", // Paris
  "dfw", // Dallas
  "ewr", // Secaucus
  "fra", // Frankfurt
  "gru", // São Paulo
  "iad", // Ashburn
  "jnb", // Johannesburg
  "lax", // Los Angeles
  "lhr", // London
  "nrt", // Tokyo
  "ord", // Chicago
  "sin", // Singapore
  "sjc", // San Jose
  "syd", // Sydney
  "yyz", // Toronto
];

const ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";
const CODE = /^[1-9A-HJ-NP-Za-km-z]{6}$/;
const REGION_UNIT = 2 ** 30; // the region's position is multiplied by this

/** Whether a text has the form of a room's code. */
export const isCode = (text: string): boolean => CODE.test(text);

/** The six characters of a whole number from 0 to 2^35 - 1. */
export function encodeCode(value: number): string {
  let code = "";
  for (let i = 0; i < 6; i++) {
    code = ALPHABET.charAt(value % 58) + code;
    value = Math.floor(value / 58);
  }
  return code;
}

/**
 * A fresh code from the cryptographic source.
 * @param region a row of `REGIONS`; without one all 35 bits are random
 */
export function newCode(region: string | undefined): string {
  const [low = 0, high = 0] = crypto.getRandomValues(new Uint32Array(2));
  const position = region === undefined ? high >>> 27 : REGIONS.indexOf(region);
  return encodeCode(position * REGION_UNIT + (low >>> 2));
}

/** The region that a code names, or undefined if its top bits name no row or it is no code. */
export function regionOf(code: string): string | undefined {
  if (!isCode(code)) return undefined;
  let value = 0;
  for (const character of code) value = value * 58 + ALPHABET.indexOf(character);
  return REGIONS[Math.floor(value / REGION_UNIT)];
}
