import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdir } from "node:fs/promises";
import { tmpdir } from "node:os";
import { Client, testRelay, type Frame } from "../shared/testing.ts";
import {
  cleanName,
  COLOURS,
  findCode,
  labelOf,
  newGame,
  newRound,
  parseGame,
  parseName,
  press,
  wins,
  type Game,
} from "./game.ts";
import { serveDemo } from "./start.ts";
import { spawnRelay, type RelayProcess } from "./testing.ts";

test("a second demo on the same port is refused: it would take half of the pages", async () => {
  const relay = "ws://localhost:9";
  await using demo = serveDemo({ port: 0, relay });
  expect(() => serveDemo({ port: demo.port as number, relay })).toThrow("in use");
});

describe("a round", () => {
  const open = (): Game => ({ ...newGame(), phase: "open", round: newRound(), out: [2] });

  test("is won by a press that names it, once, and by nobody who is out", () => {
    const game = open();
    expect(wins(game, 1, press(game))).toBe(true);
    expect(wins(game, 2, press(game))).toBe(false);
    expect(wins({ ...game, winner: 3 }, 1, press(game))).toBe(false);
    expect(wins({ ...game, phase: "ready" }, 1, press(game))).toBe(false);
  });

  test("is not won by a press from before, or by a guess", () => {
    const game = open();
    expect(wins(game, 1, press(open()))).toBe(false);
    expect(wins({ ...game, round: "" }, 1, { press: "" })).toBe(false);
    for (const data of [null, true, [], "press", { press: true }, { round: game.round }]) {
      expect(wins(game, 1, data)).toBe(false);
    }
  });
});

describe("what others send", () => {
  test("a game comes through as it was", () => {
    const game: Game = {
      ...{ phase: "won", round: "x", question: "Who?", winner: 3, reactionMs: 812.5, out: [1] },
      players: { 1: { name: "Ann", score: 2 }, 3: { name: "", score: 0, kicked: true } },
    };
    expect(parseGame(JSON.parse(JSON.stringify(game)))).toEqual(game);
  });

  test("what isn't a game is none", () => {
    const wrong = [
      { phase: "over" },
      { question: { text: "?" } },
      { winner: "1" },
      { winner: -1 },
      { reactionMs: "1" },
      { out: "12" },
      { players: { x: { name: "", score: 0 } } },
      { players: { 1: { name: 1, score: 0 } } },
      { players: { 1: { name: "", score: null } } },
      { players: { 1: null } },
    ];
    for (const fields of wrong) expect(parseGame({ ...newGame(), ...fields })).toBeUndefined();
    for (const data of [null, [], {}, "lobby"]) expect(parseGame(data)).toBeUndefined();
  });

  test("a name becomes one short line", () => {
    expect(cleanName("  Ann\n \t Bee ")).toBe("Ann Bee");
    expect(cleanName("x".repeat(1000))).toBe("x".repeat(16));
    expect(cleanName("a\u202Eb\u0000c\u200B")).toBe("abc");
    expect(cleanName("Zoë e" + "\u0301".repeat(50))).toBe("Zoë e\u0301\u0301");
    expect(cleanName("🦊".repeat(20))).toBe("🦊".repeat(16));
    expect(parseName({ name: 7 })).toBeUndefined();
    expect(parseName("Ann")).toBeUndefined();
  });

  test("a code is found in what guests type and paste", () => {
    for (const text of ["K7bQx2", " K7b Qx2 ", "http://192.168.0.7:8080/#K7bQx2", "https://x.example/?room=K7bQx2"]) {
      expect(findCode(text)).toBe("K7bQx2");
    }
    for (const text of ["", "K7bQx", "K7bQx22", "K0bQx2", "KlbQx2", "hello world"]) {
      expect(findCode(text)).toBeUndefined();
    }
  });
});

describe("colours", () => {
  /** Relative luminance as WCAG 2 defines it. */
  function luminance(hex: string): number {
    const [r, g, b] = [1, 3, 5].map((at) => {
      const part = Number.parseInt(hex.slice(at, at + 2), 16) / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r! + 0.7152 * g! + 0.0722 * b!;
  }

  test.each([...COLOURS])("$label is readable", ({ back, text }) => {
    const [dark, light] = [luminance(back), luminance(text)].sort((a, b) => a - b);
    expect((light! + 0.05) / (dark! + 0.05)).toBeGreaterThanOrEqual(4.5);
  });

  test("those who come back under other slots are told apart", () => {
    expect([1, 12, 13, 25].map((slot) => labelOf(newGame(), slot))).toEqual(["Coral", "Sand", "Coral 2", "Coral 3"]);
  });
});

describe("bun run demo", () => {
  /** Runs it until it says where the page is. */
  async function start(env: Record<string, string>) {
    const child = Bun.spawn([process.execPath, `${import.meta.dir}/start.ts`], {
      env: { PATH: process.env.PATH, DEMO_PORT: "0", ...env },
      stdout: "pipe",
    });
    let said = "";
    const decoder = new TextDecoder();
    for await (const chunk of child.stdout) {
      said += decoder.decode(chunk, { stream: true });
      if (said.includes("Demo:")) break;
    }
    const page = /Demo: +(\S+)/.exec(said)?.[1];
    const stop = async () => {
      child.kill();
      await child.exited;
    };
    return { said, page, [Symbol.asyncDispose]: stop };
  }
  const health = (relay: string) => fetch(`${relay}health`).then((answer) => answer.json());

  test("serves the page and starts a relay where none answers", async () => {
    await using demo = await start({ PORT: "0" });
    expect(demo.said).toContain("started here");
    const html = await (await fetch(demo.page!)).text();
    expect(html).toContain("<title>Buzzer</title>");
    const script = /<script[^>]+src="([^"]+)"/.exec(html)?.[1] ?? "";
    const code = await (await fetch(new URL(script, demo.page))).text();
    expect(code).toContain("set_state");
    expect(code).not.toContain("fly-replay"); // of the relay only types are imported
    const place = await (await fetch(`${demo.page}/place.json`)).json();
    expect(await health(place.relay)).toEqual({ status: "ok" });
    expect(place.page).toEndWith(new URL(demo.page!).port);
  });

  test("uses the relay that answers, under the name by which the page was found", async () => {
    await using relay = testRelay();
    await using demo = await start({ PORT: String(relay.port) });
    expect(demo.said).not.toContain("started here");
    const address = demo.page!.replace("localhost", "127.0.0.1");
    const place = await (await fetch(`${address}/place.json`)).json();
    expect(place.relay).toBe(`http://127.0.0.1:${relay.port}/`);
  });
});

const CHROMIUMS = ["google-chrome-stable", "google-chrome", "chromium-browser", "chromium"];
const missing = CHROMIUMS.some((name) => Bun.which(name)) ? "" : " (skipped: no Chromium is installed)";
const PICTURES = `${tmpdir()}/party-sockets-demo`;
const PHONE = { width: 360, height: 740 };
const TELEVISION = { width: 1920, height: 1080 };

/** A tab of the browser; its `sessionStorage` is its own. */
class Tab {
  readonly #view: Bun.WebView;
  readonly #size: typeof PHONE;
  readonly faults: string[] = [];

  constructor(size: typeof PHONE) {
    this.#size = size;
    this.#view = new Bun.WebView({
      ...size,
      backend: {
        type: "chrome",
        argv: [
          "--no-sandbox", // which root needs
          "--disable-dev-shm-usage",
          "--disable-component-update",
          "--disable-sync",
        ],
      },
      console: (type, ...args) => {
        if (type === "error") this.faults.push(args.join(" "));
      },
    });
  }
  blank(): Promise<void> {
    return this.#view.navigate("about:blank");
  }
  async open(url: string): Promise<void> {
    await this.blank(); // a change of the hash alone would load nothing
    const mobile = this.#size === PHONE;
    await this.#view.cdp("Emulation.setDeviceMetricsOverride", { ...this.#size, mobile, deviceScaleFactor: 1 });
    await this.#view.navigate(url);
  }
  reload(): Promise<void> {
    return this.#view.reload();
  }
  /** Waits until an expression holds in the page. @returns its value */
  async until<T = unknown>(expression: string): Promise<T> {
    const value = await this.#view.evaluate(`new Promise((resolve) => {
      const deadline = performance.now() + 8000;
      (function check() {
        const value = ${expression};
        if (value || performance.now() > deadline) resolve(value || null);
        else setTimeout(check, 10);
      })();
    })`);
    if (value) return value as T;
    throw new Error(`Never came: ${expression}\n${await this.#view.evaluate("document.body.innerText")}`);
  }
  /** Waits until an element is visible and says something. */
  says(selector: string, text: string): Promise<unknown> {
    const [where, what] = [JSON.stringify(selector), JSON.stringify(text)];
    return this.until(
      `[...document.querySelectorAll(${where})].some((e) => e.checkVisibility() && e.textContent.includes(${what}))`,
    );
  }
  text(selector: string): Promise<string> {
    return this.until(`document.querySelector(${JSON.stringify(selector)})?.textContent`);
  }
  click(selector: string): Promise<void> {
    return this.#view.click(selector, { timeout: 8000 });
  }
  async type(selector: string, text: string): Promise<void> {
    await this.click(selector);
    await this.#view.type(text);
  }
  press(key: string): Promise<void> {
    return this.#view.press(key);
  }
  async prefer(features: Record<string, string>): Promise<void> {
    const list = Object.entries(features).map(([name, value]) => ({ name, value }));
    await this.#view.cdp("Emulation.setEmulatedMedia", { features: list });
  }
  async picture(name: string): Promise<void> {
    await Bun.write(`${PICTURES}/${name}.png`, await this.#view.screenshot());
  }
  /** What sticks out of the window on the right, which a page must never do. */
  overflow(): Promise<unknown> {
    return this.#view.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth");
  }
  [Symbol.dispose](): void {
    this.#view.close();
  }
}

describe.skipIf(missing !== "")(`in a browser${missing}`, () => {
  let relay: RelayProcess;
  let demo: Bun.Server<undefined>;
  beforeAll(async () => {
    await mkdir(PICTURES, { recursive: true });
    relay = await spawnRelay();
    demo = serveDemo({ port: 0, relay: relay.url });
  });
  afterAll(async () => {
    await demo.stop(true);
    await relay[Symbol.asyncDispose]();
  });

  const code = (host: Tab) => host.until<string>("document.querySelector('#code').dataset.code");
  const row = (slot: number) => `#players li:nth-child(${slot})`;

  test("a host and three guests play; a guest reloads and keeps its slot; one is kicked and stays out", async () => {
    using host = new Tab(TELEVISION);
    using ann = new Tab(PHONE);
    using bob = new Tab(PHONE);
    using cat = new Tab(PHONE);
    const page = demo.url.origin;

    await Promise.all([host.open(page), ann.open(page)]);
    await ann.picture("phone-home");
    await host.click("#hostLink");
    const room = await code(host);
    await host.says("#headcount", "Waiting for the first player");

    await ann.type("#codeInput", room);
    await ann.type("#nameInput", "Ann");
    await ann.press("Enter");
    await ann.says("#myColour", "Coral");
    await host.says(`${row(1)} .name`, "Ann");
    await bob.open(`${page}/#${room}`);
    await bob.says("#myColour", "Sky");
    await cat.open(`${page}/?room=${room}`);
    await cat.says("#myColour", "Sun");
    await cat.type("#myName", "<b>Cat</b>");
    await cat.press("Enter");
    await host.says(`${row(3)} .name`, "<b>Cat</b>");
    await host.says("#headcount", "3 in");
    await host.says("#latency", " ms");
    await host.picture("television-lobby");

    await host.click("#start");
    await host.says("#lock", "Unlock");
    await ann.says("#buzzText", "Wait");
    await host.type("#question", "Which planet has the shortest day?");
    await host.press("Enter");
    const guests = [ann, bob, cat];
    await Promise.all(guests.map((guest) => guest.says("#buzzText", "Press!")));
    await ann.says("#guestQuestion", "shortest day");
    await host.says("#locked", "Locked");
    await host.picture("television-open");
    await bob.picture("phone-open");
    await Promise.all(guests.map((guest) => guest.click("#buzz")));
    await host.says("#winner span", "was first");
    const winner = await host.text("#winner b");
    const names = ["Ann", "Sky", "<b>Cat</b>"];
    const first = names.indexOf(winner);
    expect(first).not.toBe(-1);
    for (const [i, guest] of guests.entries()) {
      if (i === first) await guest.says("#buzzText", "First!");
      else await guest.says("#line", `${winner} was first`);
    }
    await host.text("#news").then((news) => expect(news).toBe(`${winner} was first`));
    await host.picture("television-won");
    await guests[first]!.picture("phone-first");
    await guests[(first + 1) % 3]!.picture("phone-late");

    await host.press("Enter"); // the focus is on “Right”
    await host.says(`${row(first + 1)} .score`, "1");
    await guests[first]!.says("#myScore", "1");

    await bob.reload();
    await bob.says("#myColour", "Sky"); // though the room is locked
    await host.says(`${row(2)} .status`, "back");
    await host.reload();
    expect(await code(host)).toBe(room);
    await host.says(`${row(first + 1)} .score`, "1");
    await host.says("#lock", "Unlock");

    // Kicked, it stays out.
    await host.click(`${row(3)} button`);
    await host.says(`${row(3)} button`, "Sure?");
    await host.click(`${row(3)} button`);
    await cat.says("#trouble", "removed");
    await host.says(`${row(3)} .status`, "kicked");
    await cat.type("#codeInput", room);
    await cat.press("Enter");
    await cat.says("#trouble", "removed");
    await cat.picture("phone-kicked");

    // The wrong answer leaves the others.
    await host.click("#open");
    await ann.says("#buzzText", "Press!");
    await ann.press("Enter");
    await host.says("#winner b", "Ann");
    await host.click("#wrong");
    await ann.says("#buzzText", "Out");
    await bob.says("#buzzText", "Press!");

    for (const tab of [host, ann, bob, cat]) expect(await tab.overflow()).toBe(0);
    await host.click("#finish");
    await host.click("#finish");
    await bob.says("#trouble", "The host's room is closed");
    await host.says("#trouble", "The game is over");
    for (const tab of [host, ann, bob, cat]) expect(tab.faults).toEqual([]);
  }, 20_000);

  test("a guest that lies gains nothing", async () => {
    using host = new Tab(TELEVISION);
    await host.open(`${demo.url.origin}/#host`);
    const liar = await Client.open(relay.url);
    const room = await code(host);
    await liar.join(room, "liar");
    const say = (data: unknown) => liar.send({ type: "send", data, echo: true });
    /** The next state that fits. */
    async function state(fits: (game: Game) => boolean): Promise<Game> {
      for (;;) {
        const frame: Frame = await liar.next();
        if (frame.type === "state" && fits(frame.data)) return frame.data;
      }
    }
    await host.says("#headcount", "1 in");
    await host.click("#start");
    const lies = [null, "won", { press: "" }, { winner: 1 }, { ...newGame(), phase: "won", winner: 1 }];
    for (const lie of lies) say(lie);
    liar.send({ type: "set_state", data: { ...newGame(), phase: "won", winner: 1 } });
    say({ name: "<img src=x onerror=alert(1)>" });
    await host.says(`${row(1)} .name`, "<img src=x onerr"); // cut, and only text
    expect(await host.text("#host")).not.toContain("was first");
    await host.click("#open");
    const first = await state(({ phase }) => phase === "open");

    // What it presses while the host is away is missed by the host, so the round doesn't count.
    await host.blank();
    while ((await liar.next()).type !== "peer_left");
    say(press(first));
    await host.open(`${demo.url.origin}/#${room}`); // the guests' link: it is the host all the same
    const second = await state(({ phase }) => phase === "open");
    expect(second.round).not.toBe(first.round);
    say(press(first));
    say(press(second));
    await host.says("#winner b", "<img");
    expect((await state(({ phase }) => phase === "won")).winner).toBe(1);
    expect(host.faults).toEqual([]);
    await liar.close();
  }, 20_000);

  test("a relay that is stopped and started again: the pages say so, and play on", async () => {
    using host = new Tab(PHONE);
    using guest = new Tab(PHONE);
    await host.open(`${demo.url.origin}/#host`);
    await host.prefer({ "prefers-color-scheme": "dark", "prefers-reduced-motion": "reduce" });
    const room = await code(host);
    await guest.open(`${demo.url.origin}/#${room}`);
    await guest.says("#buzzText", "You're in");
    await guest.prefer({ "prefers-color-scheme": "dark" });

    const stopped = relay.stop("SIGTERM");
    await Promise.all([host, guest].map((tab) => tab.says("#bannerText", "The relay restarts within")));
    await Promise.all([host, guest].map((tab) => tab.says("#bannerText", "The relay is restarting")));
    await guest.says("#latency", "No connection");
    await guest.picture("phone-dark-away");
    await stopped;
    relay = await spawnRelay(relay.port);

    await host.says("#bannerText", "new room");
    const next = await host.until<string>(
      `document.querySelector('#code').dataset.code !== '${room}' && document.querySelector('#code').dataset.code`,
    );
    await guest.says("#trouble", "The relay restarted");
    await guest.type("#codeInput", next);
    await guest.press("Enter");
    await guest.says("#buzzText", "You're in");
    await host.says("#headcount", "1 in");
    await host.picture("phone-dark-host");
    await host.click("#start");
    await host.click("#open");
    await guest.says("#buzzText", "Press!");
    expect(await host.until("getComputedStyle(document.querySelector('.waiting i')).animationName")).toBe("none");
    await guest.picture("phone-dark-press");
    expect(await host.overflow()).toBe(0);
  }, 20_000);
});
