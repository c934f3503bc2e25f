import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { whyNoBrowser } from "../shared/browser.ts";
import { Child, RelayProcess } from "../shared/processes.ts";
import { Client, type Frame } from "../shared/client.ts";
import { testRelay } from "../shared/relay.ts";
import {
  cleanName,
  COLOURS,
  faultOf,
  findInvitation,
  hashOf,
  labelOf,
  NAME_UNITS,
  newGame,
  newRound,
  parseGame,
  parseName,
  press,
  rematch,
  standings,
  winners,
  wins,
  type Game,
} from "./game.ts";
import { serveDemo } from "./start.ts";
import { LAPTOP, PHONE, Tab } from "./tab.ts";
import { roomOf } from "./tour.ts";

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
      { phase: "gone" },
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
    expect(cleanName(cleanName("x".repeat(15) + " y"))).toBe("x".repeat(15));
    expect(parseName({ name: 7 })).toBeUndefined();
    expect(parseName("Ann")).toBeUndefined();
  });

  test.each(["👨‍👩‍👧‍👦", "🇩🇪", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "❤️‍🔥", "👍🏽", "1️⃣"])("%s stays whole in a name, and is never cut in two", (emoji) => {
    expect(cleanName(`Ann ${emoji}`)).toBe(`Ann ${emoji}`);
    const many = cleanName(emoji.repeat(30));
    expect(many.length).toBeLessThanOrEqual(NAME_UNITS);
    expect(many).toBe(emoji.repeat(many.length / emoji.length));
  });

  test("names of the worst kind leave a state that the relay takes", () => {
    const worst = cleanName("न्".repeat(100)); // a letter of any length, three bytes a unit
    const players = Object.fromEntries(Array.from({ length: 60 }, (_, i) => [i + 1, { name: worst, score: 10 }]));
    const state = { ...newGame(), question: "न".repeat(140), round: newRound(), reactionMs: 1234.5678901234, players };
    expect(Buffer.byteLength(JSON.stringify(state))).toBeLessThan(16_384);
  });

  test("a code is found in what guests type and paste, and a claim in what they scan", () => {
    for (const text of ["K7bQx2", " K7b Qx2 ", "k7b-Qx2", "http://192.168.0.7:8080/#K7bQx2", "https://x.example/?room=K7bQx2"]) {
      expect(findInvitation(text)).toEqual({ code: text.startsWith("k") ? "k7bQx2" : "K7bQx2" });
    }
    const invitation = { code: "K7bQx2", claim: "aBcDeFgHiJkLmNoPqRs-_0" };
    expect(findInvitation(`http://192.168.0.7:8080/${hashOf(invitation)}`)).toEqual(invitation);
    for (const text of ["", "K7bQx", "K7bQx22", "K0bQx2", "KlbQx2", "hello world", "K7bQx2.short"]) {
      expect(findInvitation(text)).toBeUndefined();
    }
  });

  test("what is wrong with a code is said, the characters that people mix up first", () => {
    expect(faultOf("K0bQxO")).toBe("No code has a 0 (zero): try a small o.\nNo code has a capital O: try a small o.");
    expect(faultOf("KIbQl")).toContain("a capital I: try 1, or a small i.\nNo code has a small L");
    expect(faultOf("K7b Qx")).toBe("A code has six characters, this has 5.");
    expect(faultOf("K7b_Qx")).toBe("A code has only letters and digits.");
  });
});

describe("the ending", () => {
  const player = (score: number, kicked?: true) => ({ name: "", score, ...(kicked && { kicked }) });
  const game = { ...newGame(), players: { 1: player(1), 2: player(3), 3: player(9, true), 4: player(3), 5: player(0) } };

  test("ranks by score; equal scores share a place, and who was kicked has none", () => {
    expect(standings(game).map(({ slot, place }) => `${place}: ${slot}`)).toEqual(["1: 2", "1: 4", "3: 1", "4: 5"]);
    expect(winners(game)).toEqual([2, 4]);
  });

  test("has no winner if nobody scored", () => {
    expect(winners({ ...game, players: { 1: player(0), 2: player(0) } })).toEqual([]);
  });

  test("can be followed by another game with the same players", () => {
    const { phase, players } = rematch(game);
    expect(phase).toBe("ready");
    expect(players).toEqual({ 1: player(0), 2: player(0), 3: player(0, true), 4: player(0), 5: player(0) });
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
    const child = new Child([process.execPath, `${import.meta.dir}/start.ts`], { env: { DEMO_PORT: "0", ...env } });
    const [, page = ""] = await child.line(/^Demo: +(\S+)/);
    return { said: child.lines.join("\n"), page, [Symbol.asyncDispose]: () => child[Symbol.asyncDispose]() };
  }
  const health = (relay: string) => fetch(`${relay}health`).then((answer) => answer.json());

  test("serves the page and starts a relay if none answers", async () => {
    await using demo = await start({ PORT: "0" });
    expect(demo.said).toContain("started here");
    const html = await (await fetch(demo.page)).text();
    expect(html).toContain("<title>Buzzer</title>");
    const script = /<script[^>]+src="([^"]+)"/.exec(html)?.[1] ?? "";
    const code = await (await fetch(new URL(script, demo.page))).text();
    expect(code).toContain("set_state");
    expect(code).not.toContain("fly-replay"); // of the relay only types are imported
    const place = await (await fetch(`${demo.page}/place.json`)).json();
    expect(await health(place.relay)).toEqual({ status: "ok" });
    expect(place.page).toEndWith(new URL(demo.page).port);
  });

  test("uses the relay that answers, under the name by which the page was found", async () => {
    await using relay = testRelay();
    await using demo = await start({ PORT: String(relay.port) });
    expect(demo.said).not.toContain("started here");
    const address = demo.page.replace("localhost", "127.0.0.1");
    const place = await (await fetch(`${address}/place.json`)).json();
    expect(place.relay).toBe(`http://127.0.0.1:${relay.port}/`);
  });
});

const row = (slot: number) => `#player${slot}`;

describe.skipIf(whyNoBrowser !== undefined)(`in a browser${whyNoBrowser ?? ""}`, () => {
  let relay: RelayProcess;
  let demo: Bun.Server<undefined>;
  let page: string;
  beforeAll(async () => {
    relay = await RelayProcess.start();
    demo = serveDemo({ port: 0, relay: relay.url });
    page = demo.url.origin;
  });
  afterAll(async () => {
    await demo.stop(true);
    await relay[Symbol.asyncDispose]();
  });

  /** Where the QR code on a sheet leads, on this machine. */
  const invited = async (tab: Tab) => {
    const link = await tab.until<string>("document.querySelector('#sheet[open] #sheetQr')?.dataset.link");
    return `${page}/${new URL(link).hash}`;
  };

  test("two guests play a whole game, change phones in it, and see who won", async () => {
    using host = new Tab(LAPTOP);
    using ann = new Tab(PHONE);
    using bob = new Tab(PHONE);
    using other = new Tab(PHONE);
    await Promise.all([host.open(page), ann.open(page)]);
    await host.click("[href='#host']");
    const room = await roomOf(host);
    await host.says("#headcount", "Waiting for the first player");
    await host.press("Enter"); // there is nobody to play with yet
    await ann.type("#codeInput", room);
    await ann.type("#nameInput", "Ann 👨‍👩‍👧‍👦");
    await ann.press("Enter");
    await ann.says("#myColour", "Coral");
    await host.says(`${row(1)} .name`, "Ann 👨‍👩‍👧‍👦");
    await bob.open(`${page}/?room=${room}`);
    await bob.says("#myColour", "Sky");
    await bob.type("#myName", "<b>Bob</b>");
    await bob.press("Enter");
    await host.says(`${row(2)} .name`, "<b>Bob</b>");
    await host.says("#headcount", "2 in");
    await host.press("Enter");
    await host.says("#lock", "Unlock");

    // The first press wins, and the score follows.
    await host.type("#question", "Which planet has the shortest day?");
    await host.press("Enter");
    for (const guest of [ann, bob]) await guest.says("#buzzText", "Press!");
    await bob.says("#guestQuestion", "shortest day");
    await bob.press(" ");
    await bob.says("#buzzText", "First!");
    await ann.says("#line", "<b>Bob</b> was first");
    await host.says("#winner b", "<b>Bob</b>");
    expect(await host.text("#news")).toBe("<b>Bob</b> was first");
    await host.press("Enter"); // the focus is on “Right”
    await bob.says("#myScore", "1");
    await host.until("document.querySelector('#players .name').textContent.includes('Bob')"); // the best first
    await bob.reload();
    await bob.says("#myScore", "1"); // though the room is locked
    await host.says(`${row(2)} .status`, "back");
    await host.reload();
    expect(await roomOf(host)).toBe(room);
    await host.says(`${row(2)} .score`, "1");

    // Ann goes on with another phone, by herself.
    await ann.click("#move");
    await other.open(await invited(ann));
    await other.says("#myColour", "Coral");
    await ann.says("#notice", "You go on with the other phone");
    await other.until("document.querySelector('#myName').value.startsWith('Ann')");
    expect(await other.evaluate<string>("location.hash")).toBe(`#${room}`);
    await other.reload();
    await other.says("#myColour", "Coral");

    // Bob's phone is gone: the host helps. Ann's old one isn't needed any more.
    await bob.blank();
    await host.says(`${row(2)} .status`, "away");
    await host.click(row(2));
    const link = await invited(host);
    await ann.open(link);
    await ann.says("#myScore", "1");
    await host.until("!document.querySelector('#sheet').open");
    await bob.open(link);
    await bob.says("#notice", "used already");
    expect(await bob.evaluate<string>("document.querySelector('#codeInput').value")).toBe(room);

    // A wrong answer leaves the others.
    await host.click("#open");
    await ann.says("#buzzText", "Press!");
    await ann.click("#buzz");
    await host.says("#winner b", "Bob");
    await host.click("#wrong");
    await ann.says("#buzzText", "Out");
    await other.says("#buzzText", "Press!");
    await host.click("#shut");

    for (let press = 0; press < 2; press++) await host.click("#finish");
    await host.says("#verdict", "<b>Bob</b> wins");
    expect(await host.text("#standings")).toBe("1<b>Bob</b>12Ann 👨‍👩‍👧‍👦0");
    await ann.says("#myPlace", "You win!");
    await other.says("#myPlace", "Place 2 of 2");
    await host.press("Enter");
    await ann.says("#myScore", "0");
    await other.says("#line", "next question");
    for (let press = 0; press < 2; press++) await host.click("#finish");
    await other.says("#myPlace", "Nobody scored");
    for (let press = 0; press < 2; press++) await host.click("#close");
    await host.says("#notice", "The game is over");
    await other.says("#line", "Thanks for playing");
    await other.click("#out");
    await other.says(".slogan", "First to press");
    for (const tab of [host, ann, bob, other]) expect(tab.faults).toEqual([]);
  }, 20_000);

  const reader = Bun.which("zbarimg");
  const why = reader ? "" : " (skipped: no zbarimg on this machine, Debian's zbar-tools)";
  test.skipIf(reader === null)(
    `a camera finds the way to the room on the host's screen, by day and night${why}`,
    async () => {
      using host = new Tab(LAPTOP);
      await host.open(`${page}/#host`);
      const room = await roomOf(host);
      for (const theme of ["light", "dark"]) {
        await host.prefer({ "prefers-color-scheme": theme, "prefers-reduced-motion": "reduce" });
        const stdin = await host.screenshot();
        const { stdout } = Bun.spawnSync(["zbarimg", "--quiet", "--raw", "-"], { stdin });
        expect(stdout.toString().trim()).toBe(await host.evaluate<string>("document.querySelector('#joinLink').href"));
        expect(stdout.toString().trim()).toEndWith(`/#${room}`);
      }
    },
    20_000,
  );

  test("a wrong code stays where it can be corrected", async () => {
    using host = new Tab(LAPTOP);
    using guest = new Tab(PHONE);
    const value = () => guest.evaluate<string>("document.querySelector('#codeInput').value");
    await Promise.all([host.open(`${page}/#host`), guest.open(page)]);
    const room = await roomOf(host);
    await guest.type("#codeInput", `O${room.slice(1)}`);
    await guest.press("Enter");
    await guest.says("#notice", "No code has a capital O");
    expect(await value()).toBe(`O${room.slice(1)}`);
    await guest.press(room[0] === "x" ? "y" : "x"); // in place of what is wrong, which is selected
    await guest.press("Enter");
    await guest.says("#notice", "There is no room");
    expect((await value()).slice(1)).toBe(room.slice(1));
    await guest.press("Home");
    await guest.press("Delete");
    await guest.press(room[0]!);
    await guest.press("Enter");
    await guest.says("#buzzText", "You're in");
  }, 20_000);

  test("who is kicked stays out; who leaves is asked first", async () => {
    using host = new Tab(LAPTOP);
    using ann = new Tab(PHONE);
    using bob = new Tab(PHONE);
    await host.open(`${page}/#host`);
    const room = await roomOf(host);
    await ann.open(`${page}/#${room}`);
    await host.says(`${row(1)} .name`, "Coral");
    await bob.open(`${page}/#${room}`);
    await host.says(`${row(2)} .name`, "Sky");
    await host.click(row(1));
    await host.says("#sheetAction", "Kick Coral");
    await host.click("#sheetAction");
    await ann.says("#notice", "removed");
    await host.says(`${row(1)} .status`, "kicked");
    await ann.type("#codeInput", room);
    await ann.press("Enter");
    await ann.says("#notice", "removed");
    await bob.click("#leave");
    await bob.says("#leave", "Really leave?");
    await host.says("#headcount", "1 in");
    await bob.click("#leave");
    await bob.says(".slogan", "First to press");
    await host.says("#headcount", "Waiting");
  }, 20_000);

  test("a guest that lies gains nothing", async () => {
    using host = new Tab(LAPTOP);
    await host.open(`${page}/#host`);
    const liar = await Client.open(relay.url);
    const room = await roomOf(host);
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
    expect(await host.text("#hosting")).not.toContain("was first");
    await host.click("#open");
    const first = await state(({ phase }) => phase === "open");

    // What it presses while the host is away is missed by the host, so the round doesn't count.
    await host.blank();
    while ((await liar.next()).type !== "peer_left");
    say(press(first));
    await host.open(`${page}/#${room}`); // the guests' link: it is the host all the same
    const second = await state(({ phase }) => phase === "open");
    expect(second.round).not.toBe(first.round);
    say(press(first));
    say(press(second));
    await host.says("#winner b", "<img");
    expect((await state(({ phase }) => phase === "won")).winner).toBe(1);
    expect(host.faults).toEqual([]);
    await liar.close();
  }, 20_000);

  test("while the relay is away the screens say so and let nobody press in vain; then they play on", async () => {
    using host = new Tab(LAPTOP);
    using guest = new Tab(PHONE);
    const works = (tab: Tab, id: string) => tab.evaluate(`document.querySelector("${id}").ariaDisabled !== "true"`);
    await host.open(`${page}/#host`);
    await host.prefer({ "prefers-reduced-motion": "reduce" });
    const room = await roomOf(host);
    await guest.open(`${page}/#${room}`);
    await host.says("#headcount", "1 in");

    const inBoth = (text: string) => Promise.all([host, guest].map((tab) => tab.says("#bannerText", text)));
    // They come back after a random time of 0.5 to 3 s: here after 0.75 s.
    await Promise.all([host, guest].map((tab) => tab.evaluate("void (Math.random = () => 0.1)")));
    relay.signal("SIGTERM");
    await inBoth("The relay restarts within");
    const restarting = inBoth("The relay is restarting");
    const stopped = relay.stop("SIGTERM"); // the second signal ends the drain
    await restarting;
    await guest.says("#latency", "No connection");
    await host.says("#headcount", "No connection");
    for (const id of ["#start", "#lock", "#finish", row(1)]) expect(await works(host, id)).toBe(false);
    expect(await works(guest, "#move")).toBe(false);
    await host.press("Enter");
    expect(await host.evaluate<string>("document.querySelector('#hosting').dataset.phase")).toBe("lobby");
    await stopped;
    relay = await RelayProcess.start({ PORT: String(relay.port) });

    await host.says("#bannerText", "new room");
    const next = await host.until<string>(
      `document.querySelector('#code').dataset.code !== '${room}' && document.querySelector('#code').dataset.code`,
    );
    await guest.says("#notice", "The relay restarted");
    await guest.type("#codeInput", next);
    await guest.press("Enter");
    await guest.says("#buzzText", "You're in");
    await host.says("#headcount", "1 in");
    await host.click("#start");
    await host.click("#open");
    await guest.says("#buzzText", "Press!");
    expect(await host.until("getComputedStyle(document.querySelector('.waiting i')).animationName")).toBe("none");
  }, 20_000);
});
