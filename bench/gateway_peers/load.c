/* A load generator that looks at what it gets: every answer's text must be the expected one.

   load PORT REQUESTS EXPECTED name=value...
     REQUESTS  length-prefixed whole HTTP requests; connection i sends number i
     EXPECTED  the answer's text
   names: clients, seconds, warm_ms (not counted), events (a stream's; 0: plain answers),
          rate (a second, open loop; 0: closed loop), once=1 (each client one request, started
          over ramp_ms), pace_ms and late_ms (an event later than that after its turn is late),
          watch=PID,PID… (CPU these take in the counted time)

   Prints one JSON object. */
#include "net.h"
#include <sys/resource.h>

enum { BUFFER = 64 * 1024, LINE_MAX_BYTES = 16 * 1024, WATCHED_MAX = 64 };

typedef struct {
    int socket, in_flight, is_connected, sent, request;
    int in_body, is_chunked, chunk_left, chunk_state, status, keeps;
    int64_t length_left;
    int64_t asked_ns, first_ns, worst_late_ns;
    int events, is_done, is_torn, text_at, line_size, body_size, head_size;
    char line[LINE_MAX_BYTES], head[8192], *body;
} Client;

static int port, clients = 1, warm_ms = 500, events_due, rate, once, ramp_ms, pace_ms, late_ms = 250;
static double seconds = 3;
static Blobs requests;
static Blob expected;
static int queue, in_flight, open_most, idle_count, *idle;
static int64_t begin_ns, count_from_ns, count_to_ns;
static long done, failed, torn, late, counted_events, started, ended, closed_early;
static double *latency, *first;
static long latencies, firsts, room;
static int64_t *pending;
static long pending_from, pending_to;
static Client *all;
static char first_failure[600];
static int watched[WATCHED_MAX], watched_count;
static double watched_s[WATCHED_MAX];

static void note(double **row, long *count, double value) {
    if (*count >= room) return;
    (*row)[(*count)++] = value;
}

static int is_counted(int64_t at) { return at >= count_from_ns && at < count_to_ns; }

static void connect_client(Client *client) {
    struct sockaddr_in address = loopback(port);
    client->socket = socket(AF_INET, SOCK_STREAM, 0);
    set_options(client->socket);
    client->is_connected = 0;
    if (connect(client->socket, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) fail("connect");
    struct epoll_event wanted = {.events = EPOLLIN | EPOLLOUT, .data.ptr = client};
    epoll_ctl(queue, EPOLL_CTL_ADD, client->socket, &wanted);
}

static void write_request(Client *client) {
    Blob *request = &requests.blob[client->request];
    while (client->sent < (int)request->size) {
        ssize_t sent = send(client->socket, request->data + client->sent, request->size - client->sent, MSG_NOSIGNAL);
        if (sent < 0) return;
        client->sent += (int)sent;
    }
}

static void ask(Client *client, int64_t asked_ns) {
    client->in_flight = 1;
    client->asked_ns = asked_ns;
    client->sent = client->in_body = client->events = client->is_done = client->is_torn = 0;
    client->text_at = client->line_size = client->body_size = client->head_size = 0;
    client->first_ns = client->worst_late_ns = 0;
    started++;
    if (++in_flight > open_most) open_most = in_flight;
    if (client->socket < 0) connect_client(client);
    else if (client->is_connected) write_request(client);
}

static void next_request(Client *client, int64_t now);

static void finish(Client *client, int64_t now, int is_good) {
    client->in_flight = 0;
    in_flight--;
    ended++;
    int is_right = is_good && client->status == 200 && !client->is_torn;
    if (is_right && events_due) is_right = client->is_done && client->events == events_due && client->text_at == (int)expected.size;
    if (is_right && !events_due) is_right = client->body && memmem(client->body, client->body_size, expected.data, expected.size);
    int64_t at = rate ? client->asked_ns : now;
    if (once || is_counted(at)) {
        if (is_right) done++; else if (is_good && client->status == 200) torn++; else failed++;
        if (is_right) note(&latency, &latencies, (now - client->asked_ns) / 1e6);
        if (is_right && client->first_ns) note(&first, &firsts, (client->first_ns - client->asked_ns) / 1e6);
        if (client->worst_late_ns > (int64_t)late_ms * 1000000) late++;
    }
    if (!is_right && !first_failure[0])
        snprintf(first_failure, sizeof first_failure, "status %d, %d events, %d of %u characters, body %.*s", client->status,
                 client->events, client->text_at, expected.size, client->body_size > 200 ? 200 : client->body_size,
                 client->body ? client->body : "");
    if (!is_good || !client->keeps) { close(client->socket); client->socket = -1; }
    next_request(client, now);
}

static void next_request(Client *client, int64_t now) {
    if (once) return;
    if (rate) {
        if (pending_from < pending_to) ask(client, pending[pending_from++]);
        else idle[idle_count++] = (int)(client - all);
    } else if (now < count_to_ns) ask(client, now);
}

static void event_line(Client *client, int64_t now) {
    client->line[client->line_size] = 0;
    if (strncmp(client->line, "data:", 5) != 0) return;
    if (strstr(client->line, "[DONE]")) { client->is_done = 1; return; }
    char *at = strstr(client->line, "\"content\":");
    if (!at) return;
    at += 10;
    at += strspn(at, " ");
    if (*at++ != '"') return;
    char *end = strchr(at, '"');
    if (!end) { client->is_torn = 1; return; }
    int size = (int)(end - at);
    if (!size) return;
    if (client->text_at + size > (int)expected.size || memcmp(expected.data + client->text_at, at, size)) client->is_torn = 1;
    client->text_at += size;
    if (!client->first_ns) client->first_ns = now;
    int64_t late_ns = now - client->first_ns - (int64_t)client->events * pace_ms * 1000000;
    if (pace_ms && late_ns > client->worst_late_ns) client->worst_late_ns = late_ns;
    client->events++;
    if (is_counted(now)) counted_events++;
}

static void take_body(Client *client, const char *data, int size, int64_t now) {
    if (!client->body) client->body = malloc(BUFFER);
    int kept = size > BUFFER - client->body_size ? BUFFER - client->body_size : size;
    if (!events_due || client->body_size < 200) {
        memcpy(client->body + client->body_size, data, kept);
        client->body_size += kept;
    }
    if (!events_due) return;
    while (size) {
        const char *end = memchr(data, '\n', size);
        int part = end ? (int)(end - data) : size;
        if (client->line_size + part >= LINE_MAX_BYTES) { client->is_torn = 1; client->line_size = 0; }
        else { memcpy(client->line + client->line_size, data, part); client->line_size += part; }
        if (!end) return;
        event_line(client, now);
        client->line_size = 0;
        data = end + 1;
        size -= part + 1;
    }
}

static void read_head(Client *client) {
    client->head[client->head_size] = 0;
    client->status = atoi(client->head + 9);
    char *length = strcasestr(client->head, "\r\ncontent-length:");
    client->is_chunked = strcasestr(client->head, "\r\ntransfer-encoding: chunked") != NULL;
    client->keeps = strcasestr(client->head, "\r\nconnection: close") == NULL;
    client->length_left = length ? atoll(length + 17) : client->is_chunked ? 0 : INT64_MAX;
    client->in_body = 1;
    client->chunk_left = client->chunk_state = 0;
}

/* One byte of a chunk's size line or ending at a time; the data in one go. True at the answer's end. */
static int take_chunked(Client *client, const char **data, int *size, int64_t now) {
    while (*size) {
        if (client->chunk_state == 2) {
            int part = client->chunk_left < *size ? client->chunk_left : *size;
            take_body(client, *data, part, now);
            *data += part; *size -= part; client->chunk_left -= part;
            if (!client->chunk_left) client->chunk_state = 3;
            continue;
        }
        char c = *(*data)++;
        --*size;
        if (client->chunk_state == 0) {                     /* a size, or what follows it up to the line's end */
            if (c == '\n') {
                if (!client->chunk_left) { client->chunk_state = 4; continue; }
                client->chunk_state = 2;
            } else if (c == ';') client->chunk_state = 1;
            else if (c != '\r') client->chunk_left = client->chunk_left * 16 + (c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
        } else if (client->chunk_state == 1) {
            if (c == '\n') client->chunk_state = client->chunk_left ? 2 : 4;
        } else if (client->chunk_state == 3) {
            if (c == '\n') client->chunk_state = 0;
        } else if (client->chunk_state == 4 && c == '\n') return 1;
    }
    return 0;
}

static void take(Client *client, const char *data, int size) {
    int64_t now = now_ns();
    while (size && client->in_flight) {
        if (!client->in_body) {
            int kept = size < (int)sizeof client->head - 1 - client->head_size ? size : (int)sizeof client->head - 1 - client->head_size;
            int before = client->head_size;
            memcpy(client->head + before, data, kept);
            client->head_size += kept;
            char *end = memmem(client->head, client->head_size, "\r\n\r\n", 4);
            if (!end) { if (!kept) { finish(client, now, 0); return; } data += kept; size -= kept; continue; }
            int head = (int)(end + 4 - client->head);
            data += head - before; size -= head - before;
            client->head_size = head;
            read_head(client);
            if (!client->is_chunked && !client->length_left) { finish(client, now, 1); return; }
        } else if (client->is_chunked) {
            if (take_chunked(client, &data, &size, now)) finish(client, now, 1);
        } else {
            int part = client->length_left < size ? (int)client->length_left : size;
            take_body(client, data, part, now);
            data += part; size -= part; client->length_left -= part;
            if (!client->length_left) finish(client, now, 1);
        }
    }
}

static void readable(Client *client) {
    static char buffer[BUFFER];
    ssize_t got = recv(client->socket, buffer, sizeof buffer, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got > 0) { take(client, buffer, (int)got); return; }
    if (!client->in_flight) {
        closed_early++;
        close(client->socket);
        client->socket = -1;
    } else finish(client, now_ns(), client->in_body && client->length_left > INT64_MAX / 2 && !client->is_chunked);
}

static void handle(Client *client, uint32_t what) {
    if (!client->is_connected && what & EPOLLOUT) {
        client->is_connected = 1;
        if (client->in_flight) write_request(client);
        struct epoll_event wanted = {.events = EPOLLIN, .data.ptr = client};
        epoll_ctl(queue, EPOLL_CTL_MOD, client->socket, &wanted);
    }
    if (what & (EPOLLIN | EPOLLHUP | EPOLLERR)) readable(client);
}

/* ---- the clock's side: whom to start, what to measure */

static double cpu_s(int pid) {
    char path[64], text[1024];
    unsigned long user = 0, system = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    size_t size = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[size] = 0;
    char *after = strrchr(text, ')');
    if (after) sscanf(after + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system);
    return (double)(user + system) / sysconf(_SC_CLK_TCK);
}

static void read_busy(double *busy) {
    char line[512];
    FILE *file = fopen("/proc/stat", "r");
    while (file && fgets(line, sizeof line, file)) {
        int cpu;
        double t[8] = {0};
        if (sscanf(line, "cpu%d %lf %lf %lf %lf %lf %lf %lf %lf", &cpu, t, t + 1, t + 2, t + 3, t + 4, t + 5, t + 6, t + 7) < 5) continue;
        if (cpu < 64) busy[cpu] = (t[0] + t[1] + t[2] + t[5] + t[6] + t[7]) / sysconf(_SC_CLK_TCK);
    }
    if (file) fclose(file);
}

static void start_due(int64_t now) {
    static long opened;
    if (once) {
        while (opened < clients && now >= begin_ns + (int64_t)ramp_ms * 1000000 * opened / clients) ask(&all[opened++], now_ns());
    } else if (rate) {
        while (now < count_to_ns && now >= begin_ns + opened * 1000000000 / rate) {
            int64_t due = begin_ns + opened++ * 1000000000 / rate;
            if (idle_count) ask(&all[idle[--idle_count]], due);
            else if (pending_to < room) pending[pending_to++] = due;
        }
    } else for (; opened < clients; opened++) ask(&all[opened], now);
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double percentile(double *row, long count, double percent) {
    if (!count) return -1;
    qsort(row, count, sizeof *row, compare);
    long at = (long)(count * percent / 100);
    return row[at < count ? at : count - 1];
}

static void read_option(const char *text) {
    struct { const char *name; int *value; } names[] = {
        {"clients=", &clients}, {"warm_ms=", &warm_ms}, {"events=", &events_due}, {"rate=", &rate}, {"once=", &once},
        {"ramp_ms=", &ramp_ms}, {"pace_ms=", &pace_ms}, {"late_ms=", &late_ms},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strncmp(text, names[i].name, strlen(names[i].name))) { *names[i].value = atoi(text + strlen(names[i].name)); return; }
    if (!strncmp(text, "seconds=", 8)) { seconds = atof(text + 8); return; }
    if (!strncmp(text, "watch=", 6)) {
        for (char *at = strdup(text + 6), *pid; (pid = strsep(&at, ",")) && watched_count < WATCHED_MAX;)
            if (*pid) watched[watched_count++] = atoi(pid);
        return;
    }
    fprintf(stderr, "unknown option %s\n", text);
    exit(2);
}

static void report(double counted_s, const double *busy) {
    struct rusage own;
    getrusage(RUSAGE_SELF, &own);
    double own_s = own.ru_utime.tv_sec + own.ru_stime.tv_sec + (own.ru_utime.tv_usec + own.ru_stime.tv_usec) / 1e6, watched_sum = 0;
    for (int i = 0; i < watched_count; i++) watched_sum += watched_s[i];
    printf("{\"done\":%ld,\"failed\":%ld,\"torn\":%ld,\"late\":%ld,\"unfinished\":%d,\"seconds\":%.4f,\"events\":%ld,"
           "\"open_most\":%d,\"p50_ms\":%.4f,\"p99_ms\":%.4f,\"first_p50_ms\":%.4f,\"first_p99_ms\":%.4f,"
           "\"cpu_s\":%.4f,\"own_cpu_s\":%.4f,\"busy\":[%.4f,%.4f],\"first_failure\":\"",
           done, failed, torn, late, in_flight, counted_s, counted_events, open_most, percentile(latency, latencies, 50),
           percentile(latency, latencies, 99), percentile(first, firsts, 50), percentile(first, firsts, 99),
           watched_sum, own_s, busy[0] / counted_s, busy[1] / counted_s);
    for (char *c = first_failure; *c; c++) if (*c >= ' ' && *c != '"' && *c != '\\' && *c < 127) putchar(*c);
    printf("\"}\n");
}

int main(int argc, char **argv) {
    if (argc < 4) { fprintf(stderr, "load PORT REQUESTS EXPECTED name=value...\n"); return 2; }
    port = atoi(argv[1]);
    requests = read_blobs(argv[2]);
    expected = read_file(argv[3]);
    for (int i = 4; i < argc; i++) read_option(argv[i]);
    room = 4000000;
    latency = malloc(sizeof(double) * room);
    first = malloc(sizeof(double) * room);
    pending = malloc(sizeof(int64_t) * room);
    idle = malloc(sizeof(int) * clients);
    all = calloc(clients, sizeof *all);
    queue = epoll_create1(0);
    for (int i = 0; i < clients; i++) {
        all[i].socket = -1;
        all[i].request = i % requests.count;
        if (rate) idle[idle_count++] = clients - 1 - i;
    }
    begin_ns = now_ns();
    count_from_ns = begin_ns + (int64_t)warm_ms * 1000000;
    count_to_ns = count_from_ns + (int64_t)(seconds * 1e9);
    int64_t give_up_ns = count_to_ns + (rate ? 15000000000LL : 0);
    int is_counting = 0;
    double busy_before[64] = {0}, busy_after[64] = {0};
    struct epoll_event ready[512];
    for (;;) {
        int64_t now = now_ns();
        if (!is_counting && now >= count_from_ns) {
            is_counting = 1;
            read_busy(busy_before);
            for (int i = 0; i < watched_count; i++) watched_s[i] = -cpu_s(watched[i]);
        }
        if (once && ended == clients) break;
        if (now >= count_to_ns && (!rate || !in_flight || now >= give_up_ns)) break;
        start_due(now);
        int count = epoll_wait(queue, ready, 512, 1);
        for (int i = 0; i < count; i++) handle(ready[i].data.ptr, ready[i].events);
    }
    double counted_s = (now_ns() - count_from_ns) / 1e9;
    read_busy(busy_after);
    for (int i = 0; i < watched_count; i++) watched_s[i] += cpu_s(watched[i]);
    for (int i = 0; i < 64; i++) busy_after[i] -= busy_before[i];
    report(rate ? seconds : counted_s, busy_after);
    return 0;
}
