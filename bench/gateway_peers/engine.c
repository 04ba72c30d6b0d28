/* A stub of an OpenAI-compatible engine: the same answer to everybody, as fast as a core can write it.

   engine PORT ANSWER EVENTS
     ANSWER  body of a plain answer
     EVENTS  length-prefixed server-sent events of a stream; each is its own chunk and its own write()

   A request that says "stream": true gets the stream; "pace_ms=N" in its text spaces the events. */
#include "net.h"

enum { REQUEST_MAX = 256 * 1024, WHEEL_MS = 4096 };

typedef struct Client {
    int socket, size, event, written, pace_ms;
    int64_t next_ms;
    struct Client *next_in_slot;
    char in[REQUEST_MAX];
} Client;

static int queue;
static Blob answer, models;
static Blobs events;                    /* the head is the first of them */
static Client *wheel[WHEEL_MS];         /* paced streams by the millisecond of their next event */
static int64_t wheel_ms;

static Blob with_head(const char *type, Blob body) {
    Blob whole = {malloc(body.size + 256), 0};
    whole.size = (uint32_t)sprintf(whole.data,
        "HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %u\r\n\r\n", type, body.size);
    memcpy(whole.data + whole.size, body.data, body.size);
    whole.size += body.size;
    return whole;
}

static void frame_events(void) {
    static const char head[] =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    Blobs framed = {malloc(sizeof(Blob) * (events.count + 1)), events.count};
    for (int i = 0; i < events.count; i++) {
        Blob event = events.blob[i], out = {malloc(event.size + 256), 0};
        if (i == 0) out.size = (uint32_t)sprintf(out.data, "%s", head);
        out.size += (uint32_t)sprintf(out.data + out.size, "%x\r\n", event.size);
        memcpy(out.data + out.size, event.data, event.size);
        out.size += event.size;
        out.size += (uint32_t)sprintf(out.data + out.size, i == events.count - 1 ? "\r\n0\r\n\r\n" : "\r\n");
        framed.blob[i] = out;
    }
    events = framed;
}

static void drop(Client *client) { close(client->socket); client->socket = -1; }

static void wait_for(Client *client, uint32_t what) {
    struct epoll_event wanted = {.events = what, .data.ptr = client};
    epoll_ctl(queue, EPOLL_CTL_MOD, client->socket, &wanted);
}

static void put_in_wheel(Client *client) {
    Client **slot = &wheel[client->next_ms % WHEEL_MS];
    client->next_in_slot = *slot;
    *slot = client;
}

/* Write what is due; a paced stream's next event goes into the wheel. */
static void continue_stream(Client *client) {
    while (client->event < events.count) {
        Blob *event = &events.blob[client->event];
        ssize_t sent = send(client->socket, event->data + client->written, event->size - client->written, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) { wait_for(client, EPOLLIN | EPOLLOUT); return; }
        if (sent < 0) { drop(client); return; }
        client->written += (int)sent;
        if (client->written < (int)event->size) continue;
        client->written = 0;
        client->event++;
        if (client->pace_ms && client->event < events.count) {
            client->next_ms += client->pace_ms;
            put_in_wheel(client);
            return;
        }
    }
    client->event = -1;
}

static void serve(Client *client, char *body, int is_get, int is_models) {
    if (is_get) {
        Blob out = is_models ? models : answer;
        if (send(client->socket, out.data, out.size, MSG_NOSIGNAL) < 0) drop(client);
        return;
    }
    char *at = strstr(body, "\"stream\"");
    if (!at || strncmp(at + 8 + strspn(at + 8, ": "), "true", 4) != 0) {
        if (send(client->socket, answer.data, answer.size, MSG_NOSIGNAL) < 0) drop(client);
        return;
    }
    at = strstr(body, "pace_ms=");
    client->pace_ms = at ? atoi(at + 8) : 0;
    client->event = client->written = 0;
    client->next_ms = now_ns() / 1000000;
    continue_stream(client);
}

/* Give the bytes of the first whole request in `in`, 0 if there is none yet. */
static int whole_request(Client *client, char **body) {
    client->in[client->size] = 0;
    char *end = strstr(client->in, "\r\n\r\n");
    if (!end) return 0;
    *body = end + 4;
    int head = (int)(*body - client->in);
    *end = 0;
    char *length = strcasestr(client->in, "\r\ncontent-length:");
    int is_chunked = strcasestr(client->in, "\r\ntransfer-encoding: chunked") != NULL;
    *end = '\r';
    if (is_chunked) {
        char *last = strstr(*body, "\r\n0\r\n\r\n");
        return last ? (int)(last + 7 - client->in) : 0;
    }
    int size = head + (length ? atoi(length + 17) : 0);
    return client->size >= size ? size : 0;
}

static void readable(Client *client) {
    ssize_t got = recv(client->socket, client->in + client->size, REQUEST_MAX - 1 - client->size, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) { drop(client); return; }
    client->size += (int)got;
    char *body;
    for (int size; client->event < 0 && client->socket >= 0 && (size = whole_request(client, &body));) {
        char kept = client->in[size];
        client->in[size] = 0;
        int is_get = strncmp(client->in, "GET ", 4) == 0;
        serve(client, body, is_get, is_get && strstr(client->in, "/models ") != NULL);
        client->in[size] = kept;
        client->size -= size;
        memmove(client->in, client->in + size, client->size);
    }
    if (client->size >= REQUEST_MAX - 1) drop(client);
}

static void turn_wheel(void) {
    int64_t now = now_ns() / 1000000;
    for (; wheel_ms <= now; wheel_ms++) {
        Client *due = wheel[wheel_ms % WHEEL_MS];
        wheel[wheel_ms % WHEEL_MS] = NULL;
        while (due) {
            Client *next = due->next_in_slot;
            if (due->socket < 0) free(due);
            else if (due->next_ms > now) put_in_wheel(due);
            else {
                continue_stream(due);
                if (due->socket >= 0 && due->event < 0) readable(due);
            }
            due = next;
        }
    }
}

int main(int argc, char **argv) {
    if (argc != 4) { fprintf(stderr, "engine PORT ANSWER EVENTS\n"); return 2; }
    answer = with_head("application/json", read_file(argv[2]));
    char list[] = "{\"object\":\"list\",\"data\":[{\"id\":\"stub\",\"object\":\"model\",\"created\":1,\"owned_by\":\"stub\"}]}";
    models = with_head("application/json", (Blob){list, sizeof list - 1});
    events = read_blobs(argv[3]);
    frame_events();
    int server = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in address = loopback(atoi(argv[1]));
    if (bind(server, (struct sockaddr *)&address, sizeof address) || listen(server, 4096)) fail("listen");
    set_options(server);
    queue = epoll_create1(0);
    struct epoll_event wanted = {.events = EPOLLIN, .data.ptr = NULL}, ready[512];
    epoll_ctl(queue, EPOLL_CTL_ADD, server, &wanted);
    wheel_ms = now_ns() / 1000000;
    for (;;) {
        int count = epoll_wait(queue, ready, 512, 1);
        for (int i = 0; i < count; i++) {
            Client *client = ready[i].data.ptr;
            if (client) {
                if (client->socket < 0) continue;
                if (ready[i].events & EPOLLOUT && client->event >= 0) {
                    wait_for(client, EPOLLIN);
                    continue_stream(client);
                }
                if (client->socket >= 0 && ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) readable(client);
                continue;
            }
            for (int socket; (socket = accept(server, NULL, NULL)) >= 0;) {
                set_options(socket);
                client = calloc(1, sizeof *client);
                client->socket = socket;
                client->event = -1;
                struct epoll_event arrival = {.events = EPOLLIN, .data.ptr = client};
                epoll_ctl(queue, EPOLL_CTL_ADD, socket, &arrival);
            }
        }
        turn_wheel();
    }
}
