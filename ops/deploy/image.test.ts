/**
 * The Dockerfile, without an engine: its steps are done in an empty directory, and the result is started there as an engine
 * would start it: that directory as root, namespaces of its own, process 1, the image's user. The base image is stood in for
 * by Bun and the libraries that it loads.
 */
import { describe, expect, test } from "bun:test";
import { chmod, copyFile, mkdir, mkdtemp, readFile, readdir, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { basename, dirname, join } from "node:path";
import { packageManager, version } from "../../package.json" with { type: "json" };
import { LIMITS } from "../../server.ts";
import { Client } from "../shared/testing.ts";

const context = join(import.meta.dir, "../..");
const DOCKER_STOP_SECONDS = 10; // then `docker stop` kills
const BUN_USER = 1000; // `bun` of the oven/bun images

type Instruction = [name: string, rest: string];

/** The instructions of a Dockerfile, lines that go on joined, comments left out. */
function parse(dockerfile: string): Instruction[] {
  return dockerfile
    .replace(/^\s*#.*\n/gm, "")
    .replace(/\\\n\s*/g, " ")
    .split("\n")
    .filter((line) => line.trim() !== "")
    .map((line) => {
      const [, name = "", rest = ""] = /^(\w+)\s+(.*)$/.exec(line) ?? [];
      return [name.toUpperCase(), rest.trim()];
    });
}

/** The files of the context that .dockerignore lets into a build; the last pattern that matches decides. */
function inContext(name: string, dockerignore: string): boolean {
  const patterns = dockerignore.split("\n").filter((line) => line !== "" && !line.startsWith("#"));
  const last = patterns.findLast((pattern) => new Bun.Glob(pattern.replace("!", "")).match(name));
  return last === undefined || last.startsWith("!");
}

type Image = {
  from: string;
  labels: Record<string, string>;
  env: Record<string, string>;
  workdir: string;
  user: string;
  port: string;
  healthcheck: string[];
  cmd: string[];
};

/** Does the steps of the Dockerfile with `root` as the file system. @throws at an instruction that isn't known here */
async function build(root: string): Promise<Image> {
  const dockerignore = await Bun.file(join(context, ".dockerignore")).text();
  const image: Image = { from: "", labels: {}, env: {}, workdir: "/", user: "root", port: "", healthcheck: [], cmd: [] };
  const args: Record<string, string> = {};
  const fill = (text: string) => text.replace(/\$(\w+)/g, (_, name: string) => image.env[name] ?? args[name] ?? "");
  const pairs = (text: string): [string, string][] =>
    [...text.matchAll(/([\w.]+)=(?:"([^"]*)"|(\S+))/g)].map(([, key = "", quoted, plain]) => [key, fill(quoted ?? plain ?? "")]);
  const steps: Record<string, (rest: string) => void | Promise<unknown>> = {
    FROM: (rest) => void (image.from = rest),
    ARG: (rest) => void (args[rest] = `the ${rest} of --build-arg`),
    LABEL: (rest) => void Object.assign(image.labels, Object.fromEntries(pairs(rest))),
    ENV: (rest) => void Object.assign(image.env, Object.fromEntries(pairs(rest))),
    WORKDIR: (rest) => mkdir(join(root, (image.workdir = rest)), { recursive: true }),
    async COPY(rest) {
      const names = rest.split(/\s+/);
      const to = join(root, image.workdir, names.pop() as string);
      for (const name of names) {
        if (!inContext(name, dockerignore)) throw new Error(`.dockerignore leaves out ${name}`);
        await copyFile(join(context, name), join(to, basename(name)));
      }
    },
    USER: (rest) => void (image.user = rest),
    EXPOSE: (rest) => void (image.port = fill(rest)),
    HEALTHCHECK: (rest) => void (image.healthcheck = JSON.parse(rest.slice(rest.indexOf("CMD") + 3)) as string[]),
    CMD: (rest) => void (image.cmd = JSON.parse(rest) as string[]), // throws unless in exec form
  };
  for (const [name, rest] of parse(await Bun.file(join(context, "Dockerfile")).text())) {
    const step = steps[name];
    if (step === undefined) throw new Error(`no step for ${name} here`);
    await step(rest);
  }
  return image;
}

/** Puts in what the base image brings: Bun, what it loads, and nothing to help. */
async function addBase(root: string): Promise<void> {
  await chmod(root, 0o755);
  for (const directory of ["proc", "tmp", "usr/local/bin"]) await mkdir(join(root, directory), { recursive: true });
  await copyFile(process.execPath, join(root, "usr/local/bin/bun"));
  const { stdout } = Bun.spawnSync(["ldd", process.execPath]);
  for (const [library] of stdout.toString().matchAll(/\/\S+/g)) {
    await mkdir(join(root, dirname(library)), { recursive: true });
    await copyFile(library, join(root, library));
  }
}

async function buildHere() {
  await using stack = new AsyncDisposableStack();
  const root = await mkdtemp(join(tmpdir(), "party-sockets-image-"));
  stack.defer(() => rm(root, { recursive: true, force: true }));
  const image = await build(root);
  const kept = stack.move();
  return { root, image, [Symbol.asyncDispose]: () => kept.disposeAsync() };
}

describe("the image", () => {
  test("is built from the Bun that package.json pins, by a tag that doesn't move", async () => {
    await using built = await buildHere();
    expect(built.image.from).toBe(`oven/${packageManager.replace("@", ":")}-slim`);
  });

  test("is labelled with its version and its source", async () => {
    await using built = await buildHere();
    expect(built.image.labels).toMatchObject({
      "org.opencontainers.image.version": version,
      "org.opencontainers.image.source": "the SOURCE of --build-arg",
    });
  });

  test("holds the three files that run, and its build sees no others", async () => {
    await using built = await buildHere();
    const needed = ["package.json", "regions.ts", "server.ts"];
    expect((await readdir(join(built.root, built.image.workdir))).toSorted()).toEqual(needed);
    const dockerignore = await Bun.file(join(context, ".dockerignore")).text();
    const seen = (await readdir(context)).filter((name) => inContext(name, dockerignore));
    expect(seen.toSorted()).toEqual(needed);
  });

  test("runs as its base's unprivileged user, on the port that it exposes", async () => {
    await using built = await buildHere();
    expect(built.image.user).toBe("bun");
    expect(built.image.port).toBe(built.image.env.PORT as string);
  });

  test("drains within what docker stop gives, with a second to spare for its close frames", () => {
    expect(LIMITS.drainSeconds + 1).toBeLessThan(DOCKER_STOP_SECONDS);
  });
});

const canContain = Bun.spawnSync(["sh", "-c", "unshare --pid --mount --fork true && chroot / true"]).success;
const whyNot = canContain
  ? ""
  : ` (skipped: ${Bun.which("unshare") ? "no right to make namespaces; run as root" : "unshare of util-linux is missing"})`;

/** Starts a command in the image as an engine does. @param env like `docker run -e` */
function start({ root, image }: { root: string; image: Image }, cmd: string[], env: Record<string, string>) {
  const ids = [`--setgid=${BUN_USER}`, `--setuid=${BUN_USER}`];
  const inside = [
    "--pid",
    "--fork",
    "--kill-child",
    "--mount",
    `--root=${root}`,
    "--mount-proc",
    `--wd=${image.workdir}`,
    ...ids,
  ];
  const unshare = Bun.spawn([Bun.which("unshare") as string, ...inside, ...cmd], {
    env: { PATH: "/usr/local/bin:/usr/bin:/bin", ...image.env, ...env },
    stdout: "pipe",
    stderr: "ignore", // the check's complaint where nobody answers
  });
  const output = unshare.stdout.pipeThrough(new TextDecoderStream()).getReader();
  return {
    exited: unshare.exited,
    /** Resolves at the first output. */
    firstOutput: async () => (await output.read()).value ?? "",
    /** The command's own id on this machine; it is process 1 inside. */
    pid: async () => Number(await readFile(`/proc/${unshare.pid}/task/${unshare.pid}/children`, "utf8")),
    async [Symbol.asyncDispose]() {
      unshare.kill("SIGKILL");
      await unshare.exited;
    },
  };
}

function freePort(): string {
  using server = Bun.serve({ port: 0, fetch: () => new Response() });
  return `${server.port}`;
}

test.skipIf(!canContain)(
  `the container is healthy, drains on docker stop, tells players 1012, and exits 0${whyNot}`,
  async () => {
    await using built = await buildHere();
    await addBase(built.root);
    // Any path but /health leads to the dashboard, where nobody answers.
    const env = { PORT: freePort(), DRAIN_SECONDS: "1", DASHBOARD_URL: "http://localhost:1" };
    const isHealthy = async () => {
      await using check = start(built, built.image.healthcheck, env);
      return (await check.exited) === 0;
    };
    await using relay = start(built, built.image.cmd, env);
    expect(await relay.firstOutput()).toContain(`port=${env.PORT}`);
    const pid = await relay.pid();
    const status = await readFile(`/proc/${pid}/status`, "utf8");
    expect(status).toMatch(/^NSpid:\t\d+\t1$/m);
    expect(status).toMatch(new RegExp(`^Uid:(\t${BUN_USER}){4}$`, "m"));
    expect(await isHealthy()).toBe(true);

    const player = await Client.open(`http://localhost:${env.PORT}`);
    await player.create();
    process.kill(pid, "SIGTERM");
    expect(await player.next()).toEqual({ type: "draining", seconds: 1 });
    expect(await isHealthy()).toBe(true);
    expect(await player.closed).toEqual({ code: 1012, reason: "restarting" });
    expect(await relay.exited).toBe(0);
    expect(await isHealthy()).toBe(false);
  },
  20_000,
);
