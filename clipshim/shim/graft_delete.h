/*
 * Part of launcher.c: `delete` of a container whose rootfs is a graft, without Python, which would
 * cost twice as much as the runtime's own delete.
 *
 * The engine mounted an overlay where the graft is, and takes down what it finds there. What is left
 * is what shim/teardown.py does in the end: tell the daemon, and remove our directory of the
 * container, the lock last. Anything that is not plain goes to Python as before.
 */
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <signal.h>

#define MAX_STATE (4 * 1024 * 1024)
#define LOCK_WAIT_S 30 /* as in verbs.py */

struct graft {
    char directory[PATH_MAX];        /* ours: <run_dir>/<key> */
    char runtime_directory[PATH_MAX]; /* the runtime's: gone when the container is */
    char *state;                     /* state.json, as it was before the runtime was called */
};

/* Whether JSON and paths write a word as it is. */
static bool is_plain(const char *word)
{
    return *word && word[strspn(word, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
                                      "/_.-+@:")] == 0;
}

/* Whether state.json, which json_text.py wrote, has this field; quotes in values are escaped. */
static bool state_says(const char *state, const char *name, const char *value)
{
    char field[PATH_MAX + 64];
    return snprintf(field, sizeof field, "\"%s\": \"%s\"", name, value) < (int)sizeof field &&
           strstr(state, field);
}

/* Whether state.json has nothing but the fields of a container in order: create.py writes others
 * where there is more to take down, such as volumes that are filled half. */
static bool has_only_known_fields(char *text)
{
    static const char *const known[] = {
        "version", "id", "cid", "root", "bundle", "kind", "rootfs", "lowers", "upper", "work",
        "runtime", "engine_options", "image_id", "index_digest", "mode", "reference", NULL};
    int depth = 0;
    while (*text) {
        char c = *text++;
        if (c == '{' || c == '[') {
            depth++;
        } else if (c == '}' || c == ']') {
            depth--;
        } else if (c == '"') {
            size_t length;
            const char *name = json_string(&text, &length);
            if (!name || (depth == 1 && *text == ':' && !is_one_of(name, length, known)))
                return false;
        }
    }
    return !depth;
}

/* Whether a container's directory has what every one has, and no trace of anything unfinished. */
static bool holds_only_the_plan(const char *path)
{
    DIR *directory = opendir(path);
    struct dirent *entry;
    bool only = directory != NULL;
    while (only && (entry = readdir(directory)))
        only = !strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..") ||
               !strcmp(entry->d_name, "lock") || !strcmp(entry->d_name, "state.json");
    if (directory)
        closedir(directory);
    return only;
}

static char *read_state(const struct graft *graft)
{
    char path[PATH_MAX + 32];
    int error;
    snprintf(path, sizeof path, "%s/state.json", graft->directory);
    return read_file(path, MAX_STATE, &error);
}

/* Finds the one container that is meant, if it is a graft and the call as plain as engines' are. */
static bool find_graft(const char *run_dir, const char *runtime, const char *root, char **words,
                       struct graft *graft)
{
    const char *id = NULL, *base = strrchr(runtime, '/');
    char real_root[PATH_MAX];
    DIR *directory;
    struct dirent *entry;
    bool found = false;
    if (geteuid() || getenv("CLIPSHIM_TRACE_KILL"))
        return false;
    for (; *words; words++) {
        if (!strcmp(*words, "--force") || !strcmp(*words, "-f"))
            continue;
        if (id || **words == '-' || !is_plain(*words) || strchr(*words, '/'))
            return false;
        id = *words;
    }
    if (!root) {
        if (!base || !strcmp(base, "/crun")) /* its default has more to it: state.py */
            return false;
        root = "/run/runc";
    }
    if (!id || !realpath(root, real_root) || !is_plain(real_root) ||
        snprintf(graft->runtime_directory, PATH_MAX, "%s/%s", real_root, id) >= PATH_MAX)
        return false;
    directory = opendir(run_dir);
    while (directory && !found && (entry = readdir(directory))) {
        const char *key = entry->d_name;
        size_t length = strlen(id);
        if (strncmp(key, id, length) || (key[length] && key[length] != '-') || !is_plain(key) ||
            snprintf(graft->directory, PATH_MAX, "%s/%s", run_dir, key) >= PATH_MAX)
            continue;
        graft->state = read_state(graft);
        found = graft->state && state_says(graft->state, "id", id) &&
                state_says(graft->state, "root", real_root) &&
                state_says(graft->state, "kind", "graft") &&
                has_only_known_fields(graft->state) && holds_only_the_plan(graft->directory);
    }
    if (directory)
        closedir(directory);
    return found;
}

/* In the child: becomes the runtime, with everything as the caller left it (shim/child.py). */
static void become_runtime(char *runtime, char **argv, const sigset_t *mask, bool ignores_children,
                           pid_t parent)
{
    const char *listens = getenv("LISTEN_PID"); /* sd_listen_fds(3): sockets passed to us */
    char pid[32];
    snprintf(pid, sizeof pid, "%ld", (long)parent);
    if (listens && !strcmp(listens, pid)) {
        snprintf(pid, sizeof pid, "%ld", (long)getpid());
        setenv("LISTEN_PID", pid, 1);
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* an engine that dies takes the runtime with it */
    if (ignores_children)
        signal(SIGCHLD, SIG_IGN);
    sigprocmask(SIG_SETMASK, mask, NULL);
    argv[0] = runtime;
    execv(runtime, argv);
    fprintf(stderr, "clipshim: %s: %s\n", runtime, strerror(errno));
    _exit(127);
}

/* Runs the runtime and waits for it, passing signals on; returns its wait status. */
static int run_runtime(char *runtime, char **argv)
{
    static const int not_forwarded[] = {SIGURG, SIGSEGV, SIGBUS, SIGFPE, SIGILL,
                                        SIGTRAP, SIGSYS, SIGABRT};
    /* a caller may ignore SIGCHLD: children would end without a status (wait(2), NOTES) */
    bool ignores_children = signal(SIGCHLD, SIG_DFL) == SIG_IGN;
    sigset_t watched, before;
    pid_t child, self = getpid();
    size_t i;
    int status;
    sigfillset(&watched);
    for (i = 0; i < sizeof not_forwarded / sizeof *not_forwarded; i++)
        sigdelset(&watched, not_forwarded[i]);
    sigprocmask(SIG_BLOCK, &watched, &before);
    child = fork();
    if (child < 0) {
        fprintf(stderr, "clipshim: fork: %s\n", strerror(errno));
        exit(1);
    }
    if (!child)
        become_runtime(runtime, argv, &before, ignores_children, self);
    for (;;) {
        siginfo_t info;
        int number = sigwaitinfo(&watched, &info);
        if (number == SIGCHLD) {
            if (waitpid(child, &status, WNOHANG) == child)
                break;
        } else if (number > 0 && info.si_code <= SI_USER) {
            kill(child, number); /* a terminal's (from the kernel) reach the child by themselves */
        }
    }
    sigprocmask(SIG_SETMASK, &before, NULL);
    return status;
}

static void on_alarm(int number)
{
    (void)number; /* it ends flock(2) */
}

/* The container's lock (state.py); -1 if somebody else takes it down, or has. */
static int lock_container(const struct graft *graft)
{
    struct sigaction action = {.sa_handler = on_alarm};
    struct stat facts;
    sigset_t mask;
    char path[PATH_MAX + 32];
    bool locked;
    int fd;
    snprintf(path, sizeof path, "%s/lock", graft->directory);
    fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return -1;
    sigaction(SIGALRM, &action, NULL);
    sigemptyset(&mask);
    sigaddset(&mask, SIGALRM);
    sigprocmask(SIG_UNBLOCK, &mask, NULL);
    alarm(LOCK_WAIT_S);
    locked = !flock(fd, LOCK_EX);
    alarm(0);
    if (locked && !fstat(fd, &facts) && facts.st_nlink)
        return fd;
    close(fd);
    return -1;
}

/* Tells the daemon that nobody holds the tree for this container any more, if a daemon listens. */
static void tell_released(const char *run_dir, const char *key)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval patience = {.tv_sec = 1};
    char line[PATH_MAX + 64];
    int fd, length = snprintf(line, sizeof line, "{\"op\": \"release\", \"container\": \"%s\"}\n", key);
    if (snprintf(address.sun_path, sizeof address.sun_path, "%s/daemon.sock", run_dir) >=
        (int)sizeof address.sun_path)
        return;
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return;
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (!connect(fd, (struct sockaddr *)&address, sizeof address))
        send(fd, line, (size_t)length, MSG_NOSIGNAL);
    close(fd);
}

static void forget_graft(const char *run_dir, const struct graft *graft)
{
    char path[PATH_MAX + 32];
    char *state;
    int lock = lock_container(graft);
    if (lock < 0)
        return;
    state = read_state(graft);
    if (state && !strcmp(state, graft->state) && access(graft->runtime_directory, F_OK)) {
        tell_released(run_dir, strrchr(graft->directory, '/') + 1);
        snprintf(path, sizeof path, "%s/state.json", graft->directory);
        unlink(path);
        snprintf(path, sizeof path, "%s/lock", graft->directory);
        unlink(path);
        rmdir(graft->directory);
    } /* else a create of the same ID was quick: it is that one's now */
    close(lock);
}

/* Ends as the runtime did. */
static int delete_graft(const char *run_dir, char *runtime, char **argv, const struct graft *graft)
{
    int status = run_runtime(runtime, argv);
    struct stat facts;
    if (lstat(graft->runtime_directory, &facts) && errno == ENOENT)
        forget_graft(run_dir, graft);
    if (WIFSIGNALED(status)) {
        signal(WTERMSIG(status), SIG_DFL);
        kill(getpid(), WTERMSIG(status));
        return 128 + WTERMSIG(status);
    }
    return WEXITSTATUS(status);
}
