/* The order of things, the function as an unprivileged child, and the line to the host.
 *
 * The line is a TCP connection to the host's end of the network, opened before the function starts. This program
 * writes "hello SECRET", "ready" once something listens on the function's port, and "exit CODE", "signal NUMBER" or
 * "memory NUMBER" (killed by the kernel for want of it); it
 * reads "stop MILLISECONDS": SIGTERM, SIGKILL when the time is over. When the line breaks, the machine stops.
 *
 * Booted with "aether.park=1", it stops the function as soon as that listens, writes "parked" instead of "ready", and
 * lets go of the line when the host does. The host makes a snapshot then; its clone opens a line of its own.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { LISTEN_CHECK_MS = 5, MAX_PROCESSES = 1024 };

static int console = -1;

static void end_machine(void) __attribute__((noreturn));

static void end_machine(void)
{
    if (getpid() != 1)
        _exit(127); /* the child that was to become the function: /init sees it end */
    if (console >= 0)
        tcdrain(console);
    reboot(RB_AUTOBOOT);
    for (;;)
        pause();
}

static void line(const char *kind, const char *format, va_list values)
{
    char text[512];
    int length = snprintf(text, sizeof text, "aether-init: %s", kind);
    length += vsnprintf(text + length, sizeof text - (size_t)length - 1, format, values);
    if (length > (int)sizeof text - 2)
        length = sizeof text - 2;
    text[length++] = '\n';
    if (write(console >= 0 ? console : 2, text, (size_t)length) < 0)
        return; /* nobody to tell */
}

void say(const char *format, ...)
{
    va_list values;
    va_start(values, format);
    line("", format, values);
    va_end(values);
}

void die(const char *format, ...)
{
    va_list values;
    va_start(values, format);
    line("FATAL: ", format, values);
    va_end(values);
    end_machine();
}

static void open_console(void)
{
    struct termios mode;
    console = open("/dev/ttyS0", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (console < 0)
        die("there is no console");
    if (tcgetattr(console, &mode) == 0) {
        cfmakeraw(&mode);
        tcsetattr(console, TCSANOW, &mode);
    }
}

/* Whether something listens on `port`: 1 where the host can reach it, -1 when on loopback only, 0 when not. */
static int listens(unsigned port)
{
    static const char *const tables[] = {"/proc/net/tcp", "/proc/net/tcp6"};
    int found = 0;
    for (size_t table = 0; table < 2; table++) {
        FILE *file = fopen(tables[table], "re");
        char row[256], address[40];
        unsigned local, state;
        while (file && fgets(row, sizeof row, file)) {
            if (sscanf(row, " %*u: %39[0-9A-F]:%x %*[0-9A-F]:%*x %x", address, &local, &state) != 3)
                continue;
            if (state != 0x0a || local != port)
                continue;
            if (strcmp(address, "0100007F") != 0 && strcmp(address, "00000000000000000000000001000000") != 0) {
                fclose(file);
                return 1;
            }
            found = -1;
        }
        if (file)
            fclose(file);
    }
    return found;
}

/* How often the kernel has killed something for want of memory. */
static unsigned long memory_kills(void)
{
    unsigned long count = 0;
    char row[128];
    FILE *file = fopen("/proc/vmstat", "re");
    while (file && fgets(row, sizeof row, file))
        if (sscanf(row, "oom_kill %lu", &count) == 1)
            break;
    if (file)
        fclose(file);
    return count;
}

static void tell(int control, const char *format, ...)
{
    char text[256];
    va_list values;
    va_start(values, format);
    int length = vsnprintf(text, sizeof text, format, values);
    va_end(values);
    if (send(control, text, (size_t)length, MSG_NOSIGNAL) != length)
        die("the line to the host is broken: %s", strerror(errno));
}

void become_function(const struct assignment *work)
{
    struct rlimit processes = {MAX_PROCESSES, MAX_PROCESSES}, none = {0, 0};
    sigset_t all;
    int adjust = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (adjust < 0 || write(adjust, "0", 1) != 1)
        die("cannot make the function the first to go when memory runs out");
    int input = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (setsid() < 0 || input < 0 || dup2(input, 0) < 0 || dup2(console, 1) < 0 || dup2(console, 2) < 0)
        die("cannot connect the function: %s", strerror(errno));
    if (setrlimit(RLIMIT_NPROC, &processes) != 0 || setrlimit(RLIMIT_CORE, &none) != 0 || setgroups(0, NULL) != 0 ||
        setresgid(GUEST_GID, GUEST_GID, GUEST_GID) != 0 || setresuid(GUEST_UID, GUEST_UID, GUEST_UID) != 0 ||
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        die("cannot give up root: %s", strerror(errno));
    if (chdir("/app") != 0)
        die("cannot enter /app: %s", strerror(errno));
    sigfillset(&all);
    sigprocmask(SIG_UNBLOCK, &all, NULL);
    umask(022);
    execve(work->argv[0], work->argv, work->envp);
    die("cannot run %s: %s", work->argv[0], strerror(errno));
}

/* What the host gives a machine each time it starts: randomness, the time, and the line, which is returned. */
static int join_host(const char *token, struct assignment *work)
{
    fetch_assignment(token, work);
    stir(work->entropy);
    explicit_bzero(work->entropy, strlen(work->entropy));
    struct timespec now = {.tv_sec = (time_t)(work->time_ns / 1000000000u),
                           .tv_nsec = (long)(work->time_ns % 1000000000u)};
    if (work->time_ns && clock_settime(CLOCK_REALTIME, &now) != 0)
        die("cannot set the clock: %s", strerror(errno));
    int control = dial(HOST_ADDRESS, CONTROL_PORT, 10);
    tell(control, "hello %s\n", work->secret);
    explicit_bzero(work->secret, strlen(work->secret));
    return control;
}

/* Stop all that runs and let go of the line; returns in the clone, with its own line, when all runs again. */
static int park(pid_t function, int control)
{
    static struct assignment again;
    int status;
    char word;
    /* all of it, not its group only: nothing may run between the snapshot and the fresh randomness */
    if (kill(-1, SIGSTOP) != 0 || waitpid(function, &status, WUNTRACED) != function || !WIFSTOPPED(status))
        die("cannot stop the function");
    tell(control, "parked\n");
    if (recv(control, &word, 1, 0) != 0)
        die("the host did not let go of the line");
    close(control);
    control = join_host(read_token(console), &again);
    for (char **next = again.envp; *next; next++)
        explicit_bzero(*next, strlen(*next));
    if (kill(-1, SIGCONT) != 0)
        die("cannot let the function go on: %s", strerror(errno));
    return control;
}

/* Wait for what the children, the host and the clock bring until the function is over. */
static void supervise(pid_t function, int children, int control, const struct assignment *work)
{
    int ready = 0, warned = 0, kill_in = -1;
    struct timespec asked = {0}, now;
    char word[64];
    size_t have = 0;
    for (;;) {
        struct pollfd events[2] = {{.fd = children, .events = POLLIN}, {.fd = control, .events = POLLIN}};
        if (poll(events, 2, ready ? kill_in : LISTEN_CHECK_MS) < 0 && errno != EINTR)
            die("cannot wait: %s", strerror(errno));
        if (events[0].revents) {
            struct signalfd_siginfo ignored;
            int status;
            pid_t ended;
            if (read(children, &ignored, sizeof ignored) < 0 && errno != EAGAIN)
                die("cannot wait for children: %s", strerror(errno));
            while ((ended = waitpid(-1, &status, WNOHANG)) > 0) {
                if (ended != function)
                    continue;
                if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL && memory_kills()) {
                    say("the function was killed because the machine has no more memory");
                    tell(control, "memory %d\n", SIGKILL);
                } else if (WIFSIGNALED(status)) {
                    say("the function was ended by signal %d", WTERMSIG(status));
                    tell(control, "signal %d\n", WTERMSIG(status));
                } else {
                    say("the function exited with code %d", WEXITSTATUS(status));
                    tell(control, "exit %d\n", WEXITSTATUS(status));
                }
                return;
            }
        }
        if (events[1].revents) {
            ssize_t more = recv(control, word + have, sizeof word - 1 - have, 0);
            if (more <= 0)
                die("the host has hung up");
            have += (size_t)more;
            word[have] = 0;
            if (strchr(word, '\n')) {
                if (sscanf(word, "stop %d\n", &kill_in) != 1 || kill_in < 0)
                    die("the host said what is not understood");
                have = 0;
                kill(-function, SIGTERM);
                clock_gettime(CLOCK_MONOTONIC, &asked);
                if (!ready)
                    ready = 1; /* nobody waits for it any more */
            }
        }
        if (kill_in >= 0) {
            clock_gettime(CLOCK_MONOTONIC, &now);
            int passed = (int)((now.tv_sec - asked.tv_sec) * 1000 + (now.tv_nsec - asked.tv_nsec) / 1000000);
            kill_in = passed > kill_in ? 0 : kill_in - passed;
            asked = now;
            if (kill_in == 0) {
                kill(-function, SIGKILL);
                kill_in = -1;
            }
        }
        if (!ready) {
            int found = listens(work->port);
            if (found > 0) {
                ready = 1;
                if (parameter("park"))
                    control = park(function, control);
                tell(control, "ready\n");
            } else if (found < 0 && !warned) {
                warned = 1;
                say("the function listens on 127.0.0.1, where nobody can reach it: let it listen on 0.0.0.0");
            }
        }
    }
}

int main(void)
{
    static struct assignment work;
    sigset_t watched;
    mount_basics();
    open_console();
    load_drivers();
    if (parameter("probe")) { /* the host wants to know whether guests start here at all */
        say("this machine works");
        end_machine();
    }
    keep_working_set();
    const char *command = parameter("snapshot"), *token = command ? NULL : parameter("token");
    enter_root(!command);
    start_network();
    if (fchown(console, GUEST_UID, GUEST_GID) != 0)
        die("cannot hand over the console: %s", strerror(errno));
    if (command) {
        rehearse(command);
        token = wait_for_token(console);
        mount_code("/app");
    }
    int control = join_host(token, &work);
    sigemptyset(&watched);
    sigaddset(&watched, SIGCHLD);
    sigprocmask(SIG_BLOCK, &watched, NULL);
    int children = signalfd(-1, &watched, SFD_CLOEXEC | SFD_NONBLOCK);
    int adjust = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (children < 0 || adjust < 0 || write(adjust, "-1000", 5) != 5)
        die("cannot prepare for the function: %s", strerror(errno));
    pid_t function = fork();
    if (function < 0)
        die("cannot start the function: %s", strerror(errno));
    if (function == 0)
        become_function(&work);
    for (char **word = work.envp; *word; word++)
        explicit_bzero(*word, strlen(*word));
    supervise(function, children, control, &work);
    kill(-1, SIGKILL);
    end_machine();
}
