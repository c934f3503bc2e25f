/**
 * The client as a game gets it: the one file, copied into a fresh project of Vite and TypeScript with the strictest flags,
 * built, and run in a browser; and as plain JavaScript. Needs npm, and its registry: `bun test ./ops/demo/party.real.ts`.
 */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { copyFile, mkdir } from "node:fs/promises";
import { join } from "node:path";
import { openPage, whyNoBrowser } from "../shared/browser.ts";
import { temporaryDirectory } from "../shared/directory.ts";
import { run } from "../shared/processes.ts";
import { Client } from "../shared/client.ts";
import { testRelay } from "../shared/relay.ts";
import { within } from "../shared/wait.ts";

const whyNot = Bun.which("npm") ? undefined : " (skipped: no npm on this machine)";
const INSTALL_MS = 100_000;

const PACKAGES = {
  name: "game",
  private: true,
  type: "module",
  devDependencies: { vite: "8.3.8", typescript: "5.9.3", "typescript-7": "npm:typescript@7.0.2" },
};
const COMPILERS = ["typescript", "typescript-7"];

/** The flags of TypeScript that can only forbid, all of them that a page can be built with. */
const TSCONFIG = {
  compilerOptions: {
    target: "es2022",
    lib: ["es2022", "dom"],
    module: "esnext",
    moduleResolution: "bundler",
    moduleDetection: "force",
    types: [],
    rootDir: "src",
    outDir: "plain",
    strict: true,
    skipLibCheck: false,
    allowUnreachableCode: false,
    allowUnusedLabels: false,
    erasableSyntaxOnly: true,
    exactOptionalPropertyTypes: true,
    forceConsistentCasingInFileNames: true,
    isolatedModules: true,
    noFallthroughCasesInSwitch: true,
    noImplicitOverride: true,
    noImplicitReturns: true,
    noPropertyAccessFromIndexSignature: true,
    noUncheckedIndexedAccess: true,
    noUncheckedSideEffectImports: true,
    noUnusedLocals: true,
    noUnusedParameters: true,
    verbatimModuleSyntax: true,
  },
  include: ["src"],
};

/** A game that uses all of it, as strictly. */
const GAME = `
import { CloseCode, connect, type Failure, type Member, type Options, type Party, type Status } from "./party";

type FromScreen = { score: number };
type FromPhone = { press: string } | { name: string };

const query = new URLSearchParams(location.search);
const room: string | undefined = query.get("room") ?? undefined;
const options: Options = { url: query.get("relay") ?? "", room, claim: undefined, keepMs: 1_000 };
const party: Party<FromScreen, FromPhone> = connect<FromScreen, FromPhone>(options);
const say = (text: string): void => document.body.append(text);

party.on("status", (status: Status) => {
  if (status.code === CloseCode.KICKED || status.code === "room_full") say(status.reason ?? "");
  // @ts-expect-error there is no such code
  if (status.code === "room_fulll") say("");
});
party.on("members", (members: Member[]) => say(members.map(({ index }) => index).join()));
party.answer(({ score }, from) => score + " to " + from);
party.ready.catch(({ code, message }: Failure) => say(code + message));
await party.ready;
party.send({ name: "Ann" }, { to: party.host(), keepMs: 100 });
// @ts-expect-error phones send no scores
void (() => party.send({ score: 1 }));
const { data } = await party.once("message", ({ from }) => from === party.host(), 5_000);
const score: number = data.score;
const answer: string = await party.ask<string>(0, { press: String(score) }, { deadlineMs: 5_000 });
const { token } = await party.offer();
say(answer + token.length + party.room() + party.me() + party.now() + party.members().length + party.status().state);
party.command({ type: "set_state", data: answer });
party.send({ press: answer });
`;

/** A page that loads a script, which may write into it. */
const page = (script: string) => `<!doctype html><title>Game</title><body></body><script type="module" src="${script}"></script>`;

describe("the client in a project of its own" + (whyNot ?? ""), () => {
  let project: Awaited<ReturnType<typeof temporaryDirectory>>;
  const inProject = (...command: string[]) => run(command, { cwd: project.path });

  beforeAll(async () => {
    if (whyNot !== undefined) return;
    project = await temporaryDirectory("client");
    await mkdir(join(project.path, "src"));
    await copyFile(join(import.meta.dir, "party.ts"), join(project.path, "src/party.ts"));
    await Bun.write(join(project.path, "package.json"), JSON.stringify(PACKAGES));
    await Bun.write(join(project.path, "tsconfig.json"), JSON.stringify(TSCONFIG));
    await Bun.write(join(project.path, "src/main.ts"), GAME);
    await Bun.write(join(project.path, "index.html"), page("/src/main.ts"));
    const install = ["npm", "install", "--no-fund", "--no-audit"];
    const { exitCode, stderr } = await run(install, { cwd: project.path }, INSTALL_MS);
    if (exitCode !== 0) throw new Error(`npm install: ${stderr}`);
  }, INSTALL_MS + 10_000);
  afterAll(() => project?.[Symbol.asyncDispose]());

  test.skipIf(whyNot !== undefined).each(COMPILERS)("%s finds no fault with it, by the strictest flags", async (compiler) => {
    const tsc = `node_modules/${compiler}/bin/tsc`;
    expect(await inProject("node", tsc)).toEqual({ exitCode: 0, stdout: "", stderr: "" });
  });

  /** Plays against a page of the project, from the host's side. */
  async function play(directory: string): Promise<void> {
    await using relay = testRelay();
    await using server = Bun.serve({
      port: 0,
      async fetch(request) {
        const { pathname } = new URL(request.url);
        const file = Bun.file(join(project.path, directory, pathname === "/" ? "index.html" : pathname));
        return (await file.exists()) ? new Response(file) : new Response("Not found", { status: 404 });
      },
    });
    const host = await Client.open(relay.url);
    const room = await host.create();
    using tab = openPage();
    const next = () => within(host.next(), "a frame to the host");
    await tab.navigate(`http://localhost:${server.port}/?${new URLSearchParams({ relay: relay.url, room })}`);
    expect(await next()).toEqual({ type: "peer_joined", index: 1 });
    expect(await next()).toEqual({ type: "message", from: 1, data: { name: "Ann" } });
    host.send({ type: "send", to: 1, data: { "party-sockets": "ask", id: "a", data: { score: 7 } } });
    expect(await next()).toEqual({
      type: "message",
      from: 1,
      data: { "party-sockets": "answer", id: "a", data: "7 to 0" },
    });
    host.send({ type: "send", to: 1, data: { score: 8 } });
    const { data: question } = await next();
    expect(question).toEqual({ "party-sockets": "ask", id: expect.any(String), data: { press: "8" } });
    host.send({ type: "send", to: 1, data: { "party-sockets": "answer", id: question.id, data: "heard" } });
    expect(await next()).toEqual({ type: "message", from: 1, data: { press: "heard" } });
    host.terminate();
  }
  const whyNoPage = whyNot ?? whyNoBrowser;

  test.skipIf(whyNoPage !== undefined)("plays in a browser as Vite builds it", async () => {
    const built = await inProject("npm", "exec", "--", "vite", "build");
    expect(built).toMatchObject({ exitCode: 0 });
    await play("dist");
  });

  test.skipIf(whyNoPage !== undefined)("plays in a browser as plain JavaScript", async () => {
    const emitted = await inProject("node", "node_modules/typescript/bin/tsc");
    expect(emitted).toMatchObject({ exitCode: 0 });
    const plain = join(project.path, "plain");
    const main = await Bun.file(join(plain, "main.js")).text();
    await Bun.write(join(plain, "main.js"), main.replace('"./party"', '"./party.js"')); // as one would write it by hand
    await Bun.write(join(plain, "index.html"), page("/main.js"));
    await play("plain");
  });
});
