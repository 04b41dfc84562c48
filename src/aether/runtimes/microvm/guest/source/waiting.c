/* What differs in a guest that a snapshot is made of, and what its clones do first.
 *
 * Such a guest boots with "aether.snapshot=COMMAND" instead of a token, without code and without calling the host. It
 * runs COMMAND once, if there is one, which brings the language runtime's files into memory, says "waiting" on the console and reads
 * there. All clones go on from that read. Each is given a line with its own boot token, and from there on does what
 * every guest does; the code's drive, which is another one now, is found anew.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

enum { TOKEN_ROOM = 160, ENTROPY_BYTES = 64 };

static char drive[32];
static int driver = -1;

static void tell_driver(int fd)
{
    ssize_t length = (ssize_t)strlen(drive);
    if (fd < 0 || write(fd, drive, (size_t)length) != length)
        die("cannot change the code's drive: %s", strerror(errno));
}

void detach_code(void)
{
    char target[256];
    ssize_t size = readlink("/sys/block/vdb/device", target, sizeof target - 1);
    if (size < 0)
        die("there is no drive for the code: %s", strerror(errno));
    target[size] = 0;
    const char *name = strrchr(target, '/');
    name = name ? name + 1 : target;
    if (strlen(name) >= sizeof drive)
        die("the code's drive has a name that is too long");
    strcpy(drive, name);
    driver = open("/sys/bus/virtio/drivers/virtio_blk/bind", O_WRONLY | O_CLOEXEC);
    int fd = open("/sys/bus/virtio/drivers/virtio_blk/unbind", O_WRONLY | O_CLOEXEC);
    tell_driver(fd);
    close(fd);
}

void rehearse(const char *command)
{
    static struct assignment work;
    static char words[1024];
    static char *environment[] = {"PATH=/usr/bin", "HOME=/tmp", "LANG=C.UTF-8", "PYTHONDONTWRITEBYTECODE=1", NULL};
    int count = 0, status;
    if (!*command)
        return; /* a registered runtime says nothing that could be rehearsed */
    if (strlen(command) >= sizeof words)
        die("what is to be rehearsed is too long");
    strcpy(words, command);
    for (char *rest = words, *word; count < MAX_WORDS && (word = strtok_r(rest, ",", &rest));)
        work.argv[count++] = word;
    memcpy(work.envp, environment, sizeof environment);
    pid_t child = fork();
    if (child < 0)
        die("cannot rehearse: %s", strerror(errno));
    if (child == 0)
        become_function(&work);
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR)
            die("cannot rehearse: %s", strerror(errno));
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        die("the language runtime does not work: it ended with %d", status);
}

const char *read_token(int console)
{
    static char token[TOKEN_ROOM];
    size_t have = 0;
    for (;;) {
        ssize_t more = read(console, token + have, sizeof token - 1 - have);
        if (more <= 0)
            die("cannot read the boot token: %s", more < 0 ? strerror(errno) : "there is none");
        have += (size_t)more;
        token[have] = 0;
        char *end = strchr(token, '\n');
        if (end) {
            *end = 0;
            return token;
        }
        if (have == sizeof token - 1)
            die("the boot token is too long");
    }
}

const char *wait_for_token(int console)
{
    say("waiting");
    const char *token = read_token(console);
    tell_driver(driver);
    close(driver);
    return token;
}

void stir(const char *entropy)
{
    struct {
        int bits, bytes;
        char data[ENTROPY_BYTES];
    } pool = {.bits = ENTROPY_BYTES * 8, .bytes = ENTROPY_BYTES};
    if (strlen(entropy) != 2 * ENTROPY_BYTES)
        die("the host gave no randomness");
    for (int at = 0; at < ENTROPY_BYTES; at++) {
        char digits[3] = {entropy[2 * at], entropy[2 * at + 1], 0}, *end;
        pool.data[at] = (char)strtoul(digits, &end, 16);
        if (*end)
            die("the host's randomness cannot be read");
    }
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    if (fd < 0 || ioctl(fd, RNDADDENTROPY, &pool) != 0 || ioctl(fd, RNDRESEEDCRNG) != 0)
        die("cannot renew the kernel's randomness: %s", strerror(errno));
    close(fd);
    explicit_bzero(&pool, sizeof pool);
}
