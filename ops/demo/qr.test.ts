import { describe, expect, test } from "bun:test";
import { qrCode, qrSvg } from "./qr.ts";

const missing = Bun.which("zbarimg") ? "" : " (skipped: no zbarimg on this machine, Debian's zbar-tools)";
const ADDRESS = "http://192.168.0.7:8080/#K7bQx2";

/** What a reader of another make reads; empty if it finds no code. */
function read(modules: boolean[][], zoom = 4): string {
  const light = Array<boolean>(4).fill(false);
  const border = Array<boolean[]>(4).fill(Array<boolean>(modules.length + 8).fill(false));
  const rows = [...border, ...modules.map((row) => [...light, ...row, ...light]), ...border];
  const enlarge = <T>(list: T[]) => list.flatMap((item) => Array<T>(zoom).fill(item));
  const pixels = enlarge(rows.map((row) => enlarge(row.map(Number)).join(" ")));
  const picture = `P1 ${pixels.length} ${pixels.length}\n${pixels.join("\n")}\n`;
  const { stdout } = Bun.spawnSync(["zbarimg", "--quiet", "--raw", "-"], { stdin: Buffer.from(picture) });
  return stdout.toString().replace(/\n$/, "");
}

describe.skipIf(missing !== "")(`a QR code is read as what it says${missing}`, () => {
  // The longest text of each version, and the shortest of the next.
  const limits = [14, 26, 42, 62, 84, 106, 122, 152, 180, 213, 251, 287, 331];
  const lengths = limits.flatMap((limit) => [limit, limit + 1]).slice(0, -1);
  test.each([1, ...lengths])("%d bytes", (length) => {
    const text = ADDRESS.repeat(11).slice(-length);
    expect(read(qrCode(text))).toBe(text);
  });

  test.each([ADDRESS, `${ADDRESS}.aBcDeFgHiJkLmNoPqRs-_0`, "Zoë 🦊 日本", "0", " "])("%j", (text) => {
    expect(read(qrCode(text))).toBe(text);
  });

  test("also if a corner of it is covered, as level M promises", () => {
    const modules = qrCode(ADDRESS);
    const { length } = modules;
    for (const row of modules.slice(length - 7)) row.fill(true, length - 7); // 49 of 841 modules
    expect(read(modules)).toBe(ADDRESS);
  });
});

test("a QR code is as small as its text allows", () => {
  const sides = [1, 14, 15, 331].map((length) => qrCode("x".repeat(length)).length);
  expect(sides).toEqual([21, 21, 25, 69]);
});

test("a text that is too long is refused", () => {
  expect(() => qrCode("x".repeat(332))).toThrow("332 bytes is too long");
  expect(() => qrCode("é".repeat(166))).toThrow("332 bytes is too long");
});

test("the picture is dark on light with a light border of four modules", () => {
  const svg = qrSvg(qrCode("x"));
  expect(svg).toContain('viewBox="0 0 29 29"');
  expect(svg).toContain('<path fill="#fff" d="M0 0h29v29H0z"/>');
  expect(svg).toContain('<path d="M4 4h1v1h-1z');
});
