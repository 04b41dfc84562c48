/* The environment, fetched once with the boot token.
 *
 * The protocol is that of Firecracker's metadata service, version 2: PUT /latest/api/token opens a session, whose
 * token goes with every GET. What the host has for this machine lies at /latest/aether/BOOT_TOKEN and is given once.
 * It is base64 of records that end with a zero byte, each a letter, '=' and a value:
 *
 *     v=1 (first)   s=SECRET   r=RANDOM   t=NANOSECONDS   p=PORT   a=ARGUMENT (repeated)   e=NAME=VALUE (repeated)
 *     z= (last)
 */
#define _GNU_SOURCE
#include "guest.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

enum { ANSWER_SECONDS = 10, ROOM = 128 * 1024 };

static char answer[ROOM];

int dial(const char *address, unsigned port, int seconds)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    struct timeval limit = {.tv_sec = seconds};
    inet_pton(AF_INET, address, &to.sin_addr);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) != 0 ||
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit) != 0 ||
        connect(fd, (struct sockaddr *)&to, sizeof to) != 0)
        die("cannot reach %s:%u: %s", address, port, strerror(errno));
    return fd;
}

/* One request and its answer; returns the body, ended by a zero byte, which the next call overwrites. */
static char *ask(int fd, const char *request, size_t length)
{
    size_t have = 0, body = 0, wanted = 0;
    if (send(fd, request, length, MSG_NOSIGNAL) != (ssize_t)length)
        die("the metadata service does not listen: %s", strerror(errno));
    for (;;) {
        ssize_t more = recv(fd, answer + have, ROOM - 1 - have, 0);
        if (more <= 0)
            die("the metadata service does not answer: %s", more < 0 ? strerror(errno) : "it hung up");
        have += (size_t)more;
        answer[have] = 0;
        if (!body) {
            char *end = strstr(answer, "\r\n\r\n");
            if (!end)
                continue;
            body = (size_t)(end - answer) + 4;
            char *field = strcasestr(answer, "\r\ncontent-length:");
            if (!field || field > end)
                die("the metadata service does not say how much it answers");
            wanted = strtoul(field + 17, NULL, 10);
            if (wanted > ROOM - 1 - body)
                die("the metadata service answers too much");
            if (strncmp(answer, "HTTP/1.1 200", 12) != 0)
                die("the metadata service refuses: %.40s", answer + 9);
        }
        if (have - body >= wanted) {
            answer[body + wanted] = 0;
            return answer + body;
        }
    }
}

/* Decodes in place; returns the length. */
static size_t from_base64(char *text)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    uint32_t bits = 0;
    int count = 0;
    size_t out = 0;
    for (const char *at = text; *at && *at != '='; at++) {
        const char *digit = strchr(digits, *at);
        if (!digit)
            die("the environment cannot be read: it is not base64");
        bits = bits << 6 | (uint32_t)(digit - digits);
        if ((count += 6) >= 8)
            text[out++] = (char)(bits >> (count -= 8));
    }
    return out;
}

static void read_records(char *at, char *end, struct assignment *found)
{
    int arguments = 0, variables = 0, first = 1, whole = 0;
    while (at < end) {
        char *stop = memchr(at, 0, (size_t)(end - at));
        if (!stop || at[0] == 0 || at[1] != '=' || whole || (first && strcmp(at, "v=1") != 0))
            die("the environment cannot be read: it is damaged");
        char *value = at + 2;
        switch (at[0]) {
        case 'v': break;
        case 's': found->secret = value; break;
        case 'r': found->entropy = value; break;
        case 't': found->time_ns = strtoull(value, NULL, 10); break;
        case 'p': found->port = (unsigned)strtoul(value, NULL, 10); break;
        case 'z': whole = 1; break;
        case 'a':
            if (arguments == MAX_WORDS)
                die("the environment cannot be read: too many arguments");
            found->argv[arguments++] = value;
            break;
        case 'e':
            if (variables == MAX_WORDS)
                die("the environment cannot be read: too many variables");
            found->envp[variables++] = value;
            break;
        default: die("the environment cannot be read: it is of another version");
        }
        first = 0;
        at = stop + 1;
    }
    if (!whole || !found->secret || !found->entropy || !found->port || !arguments)
        die("the environment cannot be read: it is not whole");
}

void fetch_assignment(const char *token, struct assignment *found)
{
    static const char open[] = "PUT /latest/api/token HTTP/1.1\r\nHost: " METADATA_ADDRESS
                               "\r\nX-metadata-token-ttl-seconds: 60\r\nContent-Length: 0\r\n\r\n";
    char request[1024], session[256];
    if (!token || strlen(token) < 32 || strlen(token) > 128 || strpbrk(token, " \r\n"))
        die("there is no boot token");
    int fd = dial(METADATA_ADDRESS, 80, ANSWER_SECONDS);
    char *given = ask(fd, open, sizeof open - 1);
    if (strlen(given) >= sizeof session || strpbrk(given, "\r\n"))
        die("the metadata service's session token cannot be read");
    strcpy(session, given);
    int length = snprintf(request, sizeof request,
                          "GET /latest/aether/%s HTTP/1.1\r\nHost: " METADATA_ADDRESS
                          "\r\nAccept: text/plain\r\nX-metadata-token: %s\r\n\r\n",
                          token, session);
    char *text = ask(fd, request, (size_t)length);
    close(fd);
    size_t size = from_base64(text);
    char *kept = malloc(size + 1);
    if (!kept)
        die("there is no memory for the environment");
    memcpy(kept, text, size);
    explicit_bzero(answer, sizeof answer);
    read_records(kept, kept + size, found);
}
