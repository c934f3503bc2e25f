/** The relay behind nginx; `proxies.real.ts` has the other proxies. */
import { describeBehind } from "./behind.ts";
import { nginx } from "../shared/proxies.ts";

describeBehind(nginx, { "proxy_read_timeout 60s;": "proxy_read_timeout 2s;" }, true);
