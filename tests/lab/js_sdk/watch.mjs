// Watches the call. If there is a server `"via"` in its options, it joins the room through that server first.

import { options, start } from "./client.mjs";

const client = await start();
if (options.via !== undefined) {
    await client.joinRoom(options.roomId, { viaServers: [options.via] });
}
