/* ws.h - /ws: many requests and their events over one WebSocket.
 *
 * Job:        JSON messages to tasks, their output to JSON messages.
 * Input:      text frames {"type": "auth" | "chat" | "completion" | "cancel" | "ping", "id": ..., ...}; binary frames: images.
 * Output:     {"type": "chunk" | "done" | "error" | "image" | "pong", "id": ..., ...}.
 * Invariants: an id names one running request of its connection; a connection that goes cancels all of its requests;
 *             what waits to be read is bounded by limits.send_buffer, like an HTTP stream.
 */
#ifndef SERVE_WS_H
#define SERVE_WS_H

#include "http.h"

int ws_callback(server *s, struct lws *wsi, enum lws_callback_reasons reason, session *ss, void *in, size_t n);
/* Tells all connections that the server goes away. */
void ws_goodbye(void);

#endif
