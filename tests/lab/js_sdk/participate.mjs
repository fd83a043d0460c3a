// Takes part in the call, as MatrixRTC's clients do: by sticky memberships, with a delayed leave event that it puts
// off again and again. It has `"delayMs"` and `"restartMs"` in its options. The user is in the room already.

import { options, start } from "./client.mjs";

const { userId, deviceId, roomId, delayMs, restartMs } = options;
const client = await start();
const session = client.matrixRTC.getRoomSession(client.getRoom(roomId));
const me = { userId, deviceId, memberId: `${userId}:${deviceId}` };
const transport = { type: "livekit", livekit_service_url: "https://livekit.example.org" };
session.joinRTCSession(me, [transport], transport, {
    unstableSendStickyEvents: true,
    delayedLeaveEventDelayMs: delayMs,
    delayedLeaveEventRestartMs: restartMs,
});
