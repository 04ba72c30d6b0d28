/* What the stub engine and the load generator share: time, sockets, files of length-prefixed blobs. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

typedef struct { char *data; uint32_t size; } Blob;
typedef struct { Blob *blob; int count; } Blobs;

static void fail(const char *what) { perror(what); exit(1); }

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static Blob read_file(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) fail(path);
    fseek(file, 0, SEEK_END);
    Blob whole = {0};
    whole.size = (uint32_t)ftell(file);
    rewind(file);
    whole.data = malloc(whole.size + 1);
    if (fread(whole.data, 1, whole.size, file) != whole.size) fail(path);
    whole.data[whole.size] = 0;
    fclose(file);
    return whole;
}

/* Each blob: four bytes of size (little endian), then the bytes. */
static Blobs read_blobs(const char *path) {
    Blob whole = read_file(path);
    Blobs found = {malloc(sizeof(Blob) * (whole.size / 4 + 1)), 0};
    for (uint32_t at = 0; at + 4 <= whole.size;) {
        Blob *blob = &found.blob[found.count++];
        memcpy(&blob->size, whole.data + at, 4);
        blob->data = whole.data + at + 4;
        at += 4 + blob->size;
    }
    return found;
}

static void set_options(int socket) {
    int one = 1;
    fcntl(socket, F_SETFL, fcntl(socket, F_GETFL) | O_NONBLOCK);
    setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

static struct sockaddr_in loopback(int port) {
    struct sockaddr_in address = {0};
    address.sin_family = AF_INET;
    address.sin_port = htons((uint16_t)port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}
