/** A real browser for tests: headless Chromium, driven by Bun. */

const chromium = ["chromium", "chromium-browser", "google-chrome-stable", "google-chrome"].find((name) => Bun.which(name));

/** Why tests in a browser skip; undefined if there is one. */
export const whyNoBrowser = chromium === undefined ? " (skipped: no chromium on this machine)" : undefined;

/** A new page. All pages of a process share one browser, and what it stores for an origin. */
export function openPage(options: Pick<Bun.WebView.ConstructorOptions, "width" | "height" | "console"> = {}): Bun.WebView {
  return new Bun.WebView({
    ...options,
    backend: {
      type: "chrome",
      argv: [
        "--no-sandbox", // as root, which CI is
        "--disable-dev-shm-usage",
        "--disable-component-update", // nothing from outside
        "--disable-sync",
        "--renderer-process-limit=1", // starting a process takes longer than most of what pages are tried with
        "--disable-site-isolation-trials", // which would start one for each site all the same
      ],
    },
  });
}
