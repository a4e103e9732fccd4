/*
 * The program that engines call as `clipshim`: finds the verb and decides who carries it out.
 *
 *   a verb of runc's that is not ours       execve(runc), arguments and environment untouched
 *   create, run, restore, delete, checkpoint python3 -I -S …/clipshim/shim/main.py
 *   hook, which OCI hooks call               the same
 *   delete of a graft, as engines call it   the runtime as a child, then graft_delete.h
 *   a command of clipshim's own              python3 -I -m clipshim.cli
 *
 * It is in C because engines call the runtime four to six times a container, and for every health
 * probe: Python takes 8 ms before its first line. Everything with a decision in it is Python; what
 * is not certain here (an odd configuration, no runtime found) goes to Python too.
 *
 * Python gets the caller's environment with CLIPSHIM_CALLER: before each name, so that no variable
 * (LD_*, PYTHON*, LC_*) has an effect on it, and takes the prefix off for runc.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define DEFAULT_CONFIG "/etc/clipshim/config.toml"
#define DEFAULT_RUN_DIR "/run/clip"
#define ENV_PREFIX "CLIPSHIM_CALLER:"
#define MAX_CONFIG (256 * 1024)
#define MAX_BUNDLE (4 * 1024 * 1024)
#define MAX_NAMES 16

extern char **environ;

/* runc's global flags; shim/argv.py has the same table, and a test compares the two */
static const char *const value_flags[] = {"log", "log-format", "root", "rootless", "criu", NULL};
static const char *const switch_flags[] = {"debug", "systemd-cgroup", NULL};
static const char *const help_flags[] = {"help", "h", NULL};
static const char *const version_flags[] = {"version", "v", NULL};

static const char *const bundle_verbs[] = {"create", "run", "restore", NULL};
static const char *const recorded_verbs[] = {"delete", "checkpoint", NULL};
/* of runc and crun: others may be typing errors */
static const char *const runtime_verbs[] = {
    "checkpoint", "create", "delete",  "events", "exec", "features", "init",  "kill",  "list",
    "mounts",     "pause",  "ps",      "restore", "resume", "run",   "spec",  "start", "state",
    "update",     NULL};
static const char *const own_commands[] = {
    "index",  "inspect", "bundle",   "mount",  "umount",  "push",      "pull", "stub",
    "daemon", "status",  "doctor",   "gc",     "complete", "report", "install", "uninstall",
    "help",   NULL};

static const char *const fixed_directories[] = {
    "/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin", NULL};

struct config {
    bool certain; /* false: Python has to read it */
    char *names[MAX_NAMES + 1];
    char run_dir[PATH_MAX];
};

static bool is_one_of(const char *word, size_t length, const char *const *list)
{
    for (; *list; list++)
        if (strlen(*list) == length && !strncmp(*list, word, length))
            return true;
    return false;
}

/* The name in `-x`, `--x` and `--x=1`, as Go's flag package reads it; NULL for what is no flag. */
static const char *flag_name(const char *word, size_t *length, bool *has_value)
{
    const char *name;
    if (word[0] != '-' || !word[1])
        return NULL;
    name = word + (word[1] == '-' ? 2 : 1);
    if (!*name || *name == '-' || *name == '=')
        return NULL;
    *length = strcspn(name, "=");
    *has_value = name[*length] == '=';
    return name;
}

enum found { VERB, NOTHING, HELP, VERSION, UNKNOWN };

/* Also finds the value of --root, if there is one. */
static enum found find_verb(int argc, char **argv, int *index, const char **root)
{
    enum found asked = NOTHING;
    for (*index = 1; *index < argc; ++*index) {
        const char *word = argv[*index], *name;
        size_t length;
        bool has_value;
        if (!strcmp(word, "--")) {
            ++*index;
            break;
        }
        name = flag_name(word, &length, &has_value);
        if (!name) {
            if (word[0] == '-' && word[1])
                return UNKNOWN;
            break;
        }
        if (is_one_of(name, length, value_flags)) {
            if (!has_value && ++*index >= argc)
                return UNKNOWN;
            if (length == 4 && !strncmp(name, "root", 4))
                *root = has_value ? name + length + 1 : argv[*index];
        } else if (is_one_of(name, length, help_flags)) {
            asked = has_value ? UNKNOWN : HELP;
        } else if (is_one_of(name, length, version_flags)) {
            asked = asked == HELP ? asked : VERSION;
        } else if (!is_one_of(name, length, switch_flags)) {
            return UNKNOWN;
        }
        if (asked == UNKNOWN)
            return UNKNOWN;
    }
    if (*index < argc)
        return asked == NOTHING ? VERB : UNKNOWN;
    return asked;
}

static char *read_file(const char *path, size_t limit, int *error)
{
    char *text = malloc(limit + 1);
    size_t size = 0;
    ssize_t got = 0;
    int fd = text ? open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK) : -1;
    *error = 0;
    if (fd < 0) {
        *error = errno;
        free(text);
        return NULL;
    }
    while (size < limit && (got = read(fd, text + size, limit - size)) > 0)
        size += (size_t)got;
    close(fd);
    if (got < 0 || size == limit || memchr(text, 0, size)) {
        *error = EINVAL;
        free(text);
        return NULL;
    }
    text[size] = 0;
    return text;
}

/* Reads one TOML string without escapes; returns what follows it, or NULL. */
static char *plain_string(char *text, char **value)
{
    char quote = *text, *end;
    if (quote != '"' && quote != '\'')
        return NULL;
    *value = ++text;
    end = text + strcspn(text, quote == '"' ? "\"\\\n" : "'\n");
    if (*end != quote)
        return NULL;
    *end = 0;
    return end + 1;
}

static char *skip_blank(char *text, bool lines)
{
    for (;;) {
        text += strspn(text, lines ? " \t\r\n" : " \t");
        if (!lines || *text != '#')
            return text;
        text += strcspn(text, "\n");
    }
}

static bool parse_names(char *text, struct config *config)
{
    int count = 0;
    if (*text++ != '[')
        return false;
    for (;;) {
        text = skip_blank(text, true);
        if (*text == ']')
            break;
        if (count == MAX_NAMES || !(text = plain_string(text, &config->names[count++])))
            return false;
        text = skip_blank(text, true);
        if (*text == ',')
            text++;
        else if (*text != ']')
            return false;
    }
    config->names[count] = NULL;
    return true;
}

/* The two keys of the configuration that matter here. Anything unusual is left to Python. */
static void read_config(struct config *config)
{
    const char *named = getenv("CLIPSHIM_CONFIG");
    const char *path = named && *named ? named : DEFAULT_CONFIG;
    char *text, *line, *value;
    int error;
    config->certain = true;
    config->names[0] = "runc";
    config->names[1] = "crun";
    config->names[2] = NULL;
    strcpy(config->run_dir, DEFAULT_RUN_DIR);
    text = read_file(path, MAX_CONFIG, &error);
    if (!text) {
        config->certain = error == ENOENT && path != named;
        return;
    }
    if (strstr(text, "\"\"\"") || strstr(text, "'''")) {
        config->certain = false;
        return;
    }
    for (line = text; *line; line = *line ? line + 1 : line) {
        char *start = skip_blank(line, false), *key = start;
        size_t length = strcspn(key, " \t=\n#[");
        if (*key == '[' || *key == '"' || *key == '\'') { /* tables, quoted keys: not ours */
            config->certain = false;
            return;
        }
        start = skip_blank(key + length, false);
        if (*start == '=') {
            start = skip_blank(start + 1, false);
            if (length == 8 && !strncmp(key, "runtimes", 8)) {
                char *copy = strdup(start);
                if (!copy || !parse_names(copy, config)) {
                    config->certain = false;
                    return;
                }
            } else if (length == 7 && !strncmp(key, "run_dir", 7)) {
                char *copy = strdup(start);
                if (!copy || !plain_string(copy, &value) || *value != '/' ||
                    strlen(value) >= sizeof config->run_dir) {
                    config->certain = false;
                    return;
                }
                strcpy(config->run_dir, value);
            }
            if (*start == '[') { /* an array may go over lines: skip to its end, outside strings */
                char quote = 0;
                for (; *start && (quote || *start != ']'); start++) {
                    if (quote)
                        quote = *start == quote ? 0 : quote;
                    else if (*start == '#')
                        start += strcspn(start, "\n") - 1;
                    else if (*start == '"' || *start == '\'')
                        quote = *start;
                }
            }
        }
        line = start + strcspn(start, "\n");
    }
}

static bool same_file(const struct stat *a, const char *path)
{
    struct stat b;
    return !stat(path, &b) && a->st_dev == b.st_dev && a->st_ino == b.st_ino;
}

static bool is_runtime(const char *path, const struct stat *self)
{
    struct stat facts;
    return path[0] == '/' && !access(path, X_OK) && !stat(path, &facts) &&
           S_ISREG(facts.st_mode) && !same_file(self, path);
}

static bool find_runtime(const struct config *config, const char *self_path, char *found)
{
    struct stat self = {0};
    char *const *name;
    if (stat(self_path, &self))
        return false;
    for (name = config->names; *name; name++) {
        const char *path = getenv("PATH");
        const char *const *directory;
        if (strchr(*name, '/')) {
            if (strlen(*name) < PATH_MAX && is_runtime(strcpy(found, *name), &self))
                return true;
            continue;
        }
        while (path && *path) {
            size_t length = strcspn(path, ":");
            if (length + strlen(*name) + 2 < PATH_MAX) {
                sprintf(found, "%.*s/%s", (int)length, path, *name);
                if (is_runtime(found, &self))
                    return true;
            }
            path += length + (path[length] == ':');
        }
        for (directory = fixed_directories; *directory; directory++) {
            snprintf(found, PATH_MAX, "%s/%s", *directory, *name);
            if (is_runtime(found, &self))
                return true;
        }
    }
    *found = 0;
    return false;
}

/* Whether one of the words behind the verb may be a container that clipshim has a record of. */
static bool may_be_recorded(const char *run_dir, char **words)
{
    DIR *directory = opendir(run_dir);
    struct dirent *entry;
    bool found = false;
    if (!directory)
        return errno != ENOENT && errno != ENOTDIR && errno != EACCES;
    while (!found && (entry = readdir(directory))) {
        char **word;
        for (word = words; *word && !found; word++) {
            size_t length = strlen(*word);
            found = length && !strncmp(entry->d_name, *word, length) &&
                    (!entry->d_name[length] || entry->d_name[length] == '-');
        }
    }
    closedir(directory);
    return found;
}

/* What a container may name an index with, as it stands in config.json. */
static bool mentions_index(const char *config)
{
    return strstr(config, "io.clipshim.") || strstr(config, "io.kubernetes.cri");
}

/* The string at `text`, which begins behind its quote, if it has no escape; moves past it. */
static const char *json_string(char **text, size_t *length)
{
    const char *start = *text;
    bool plain = true;
    for (; **text && **text != '"'; ++*text)
        if (**text == '\\') {
            plain = false;
            if (!*++*text)
                return NULL;
        }
    if (!**text)
        return NULL;
    *length = (size_t)(*text - start);
    ++*text;
    return plain ? start : "";
}

#include "graft_delete.h"

/* Copies root.path of config.json; false for anything that is not plain. */
static bool root_path(char *text, char *path)
{
    int depth = 0, root_depth = 0;
    bool found = false;
    while (*text) {
        char c = *text++;
        if (c == '{' || c == '[') {
            depth++;
        } else if (c == '}' || c == ']') {
            depth--;
            root_depth = depth < root_depth ? 0 : root_depth;
        } else if (c == '"') {
            size_t length;
            const char *name = json_string(&text, &length);
            char *next = text;
            if (!name)
                return false;
            next += strspn(next, " \t\r\n");
            if (*next != ':')
                continue;
            next++;
            next += strspn(next, " \t\r\n");
            if (depth == 1 && length == 4 && !strncasecmp(name, "root", 4)) {
                if (*next != '{')
                    return false;
                root_depth = 2;
            } else if (depth == 2 && root_depth == 2 && length == 4 &&
                       !strncasecmp(name, "path", 4)) {
                size_t size;
                const char *value;
                if (*next++ != '"' || !(value = json_string(&next, &size)) || !*value ||
                    size >= PATH_MAX || found)
                    return false;
                memcpy(path, value, size);
                path[size] = 0;
                found = true;
            }
            text = next;
        }
    }
    return found && depth == 0;
}

/* Whether a bundle certainly names no index: then runc gets it without Python. */
static bool names_no_index(char **words)
{
    const char *bundle = ".";
    char path[PATH_MAX], root[PATH_MAX], stub[PATH_MAX + 32];
    struct stat facts;
    char *text;
    bool plain;
    int error;
    for (; *words; words++) {
        size_t length;
        bool has_value;
        const char *name = flag_name(*words, &length, &has_value);
        if (!name || !((length == 6 && !strncmp(name, "bundle", 6)) ||
                       (length == 1 && *name == 'b')))
            continue;
        if (has_value)
            bundle = name + length + 1;
        else if (!*++words)
            return false;
        else
            bundle = *words;
    }
    if (snprintf(path, sizeof path, "%s/config.json", bundle) >= (int)sizeof path)
        return false;
    text = read_file(path, MAX_BUNDLE, &error);
    if (!text)
        return false;
    /* an annotation could be written with \u escapes */
    plain = !strstr(text, "\\u") && !mentions_index(text) && root_path(text, root);
    free(text);
    if (!plain)
        return false;
    if (snprintf(stub, sizeof stub, "%s%s%s/.clip/index.clip", *root == '/' ? "" : bundle,
                 *root == '/' ? "" : "/", root) >= (int)sizeof stub)
        return false;
    return lstat(stub, &facts) && (errno == ENOENT || errno == ENOTDIR);
}

static char **prefixed_environment(void)
{
    size_t count = 0, i;
    char **result;
    while (environ[count])
        count++;
    result = calloc(count + 1, sizeof *result);
    for (i = 0; result && i < count; i++) {
        result[i] = malloc(sizeof ENV_PREFIX + strlen(environ[i]));
        if (!result[i])
            return NULL;
        strcat(strcpy(result[i], ENV_PREFIX), environ[i]);
    }
    return result;
}

/* The directory that holds the package clipshim; false if only `import` can find it. */
static bool package_root(const char *prefix, char *root)
{
    char file[PATH_MAX + 64];
#ifdef CLIPSHIM_ROOT
    snprintf(root, PATH_MAX, "%s", CLIPSHIM_ROOT); /* an editable installation */
    snprintf(file, sizeof file, "%s/clipshim/shim/main.py", root);
    (void)prefix;
    return !access(file, R_OK);
#else
    static const char *const patterns[] = {
        "lib/python3*/site-packages", "lib64/python3*/site-packages",
        "lib/python3*/dist-packages", "local/lib/python3*/dist-packages", NULL};
    const char *const *pattern;
    for (pattern = patterns; *pattern; pattern++) {
        glob_t found;
        bool one = false;
        snprintf(file, sizeof file, "%s/%s/clipshim/shim/main.py", prefix, *pattern);
        if (!glob(file, 0, NULL, &found)) {
            const char *suffix = "/clipshim/shim/main.py";
            size_t length = strlen(found.gl_pathv[0]) - strlen(suffix);
            one = found.gl_pathc == 1 && length < PATH_MAX;
            if (one)
                sprintf(root, "%.*s", (int)length, found.gl_pathv[0]);
            globfree(&found);
        }
        if (one)
            return true;
    }
    return false;
#endif
}

static void run_python(const char *self, const char *runtime, char **argv, bool own_command)
{
    char bin[PATH_MAX], python[PATH_MAX + 16], root[PATH_MAX], main_file[PATH_MAX + 64];
    char **arguments, **environment;
    int count = 0, i = 0;
    char *slash;
    while (argv[count])
        count++;
    arguments = calloc((size_t)count + 8, sizeof *arguments);
    strcpy(bin, self);
    slash = strrchr(bin, '/');
    *(slash ? slash : bin) = 0;
    snprintf(python, sizeof python, "%s/python3", bin);
    slash = strrchr(bin, '/');
    *(slash ? slash : bin) = 0; /* bin is now the prefix */
    arguments[i++] = python;
    arguments[i++] = "-I";
    if (own_command) { /* a user's own command: Python as it is, with the user's environment */
        environment = environ;
        arguments[i++] = "-m";
        arguments[i++] = "clipshim.cli";
    } else {
        environment = prefixed_environment();
        if (package_root(bin, root)) {
            snprintf(main_file, sizeof main_file, "%s/clipshim/shim/main.py", root);
            arguments[i++] = "-S";
            arguments[i++] = main_file;
        } else {
            arguments[i++] = "-m";
            arguments[i++] = "clipshim.shim.main";
        }
        arguments[i++] = (char *)runtime;
        arguments[i++] = (char *)self;
    }
    while (*++argv)
        arguments[i++] = *argv;
    if (environment)
        execve(python, arguments, environment);
    fprintf(stderr, "clipshim: %s: %s\n", python, strerror(errno));
    exit(1);
}

int main(int argc, char **argv)
{
    char self[PATH_MAX] = "", runtime[PATH_MAX] = "";
    struct config config;
    struct graft graft;
    enum found found;
    const char *root = NULL;
    int index;
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    if (length < 0 && !realpath(argv[0], self)) {
        fprintf(stderr, "clipshim: cannot find itself: %s\n", strerror(errno));
        return 1;
    }
    found = find_verb(argc, argv, &index, &root);
#ifdef CLIPSHIM_LAUNCHER_TEST /* says what it would do: "VERB INDEX", or what it found instead */
    if (found == VERB)
        printf("%s %d\n", argv[index], index - 1);
    else
        puts(found == HELP ? "-help" : found == VERSION ? "-version"
                                   : found == NOTHING   ? "-nothing" : "-unknown");
    return 0;
#endif
    if (found == HELP || found == NOTHING ||
        (found == VERB && is_one_of(argv[index], strlen(argv[index]), own_commands)))
        run_python(self, "", argv, true);
    if (found == VERB && !strcmp(argv[index], "hook"))
        run_python(self, "", argv, false);
    read_config(&config);
    if (!config.certain || !find_runtime(&config, self, runtime))
        run_python(self, "", argv, false); /* it says what is wrong, or knows better */
    if (found == VERB) {
        const char *verb = argv[index];
        bool python = false;
        if (is_one_of(verb, strlen(verb), bundle_verbs))
            python = !names_no_index(argv + index + 1);
        else if (is_one_of(verb, strlen(verb), recorded_verbs))
            python = may_be_recorded(config.run_dir, argv + index + 1);
        if (python && !strcmp(verb, "delete") &&
            find_graft(config.run_dir, runtime, root, argv + index + 1, &graft))
            return delete_graft(config.run_dir, runtime, argv, &graft);
        if (python)
            run_python(self, runtime, argv, false);
        /* Engines get the runtime's answer alone; a person learns whose answer it is. */
        if (!is_one_of(verb, strlen(verb), runtime_verbs) && isatty(STDERR_FILENO))
            fprintf(stderr, "clipshim: no command of clipshim (see clipshim help), so %s answers:\n",
                    runtime);
    }
    argv[0] = runtime; /* runc's usage texts show it */
    execv(runtime, argv);
    fprintf(stderr, "clipshim: %s: %s\n", runtime, strerror(errno));
    return 1;
}
