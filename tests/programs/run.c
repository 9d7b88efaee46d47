/*
 * For tests of `memleak run`: each argument is done in turn, without any talk to the harness.
 *
 *   leak        loses 131 blocks of 13 bytes
 *   handler     a global of 7 blocks of 43 bytes, freed by a handler of atexit()
 *   destructor  a global of 5 blocks of 59 bytes, freed by a destructor
 *   static      one block of 1,009 bytes that a global still holds at the end
 *   fork        three children that lose 11 blocks of 37 bytes each and end at once
 *   vfork       /bin/true by vfork and exec
 *   exec        runs itself again with the remaining arguments
 *   texec       the same from another thread, which allocates before
 *   daemon      a grandchild that detaches itself, loses 17 blocks of 71 bytes and stays for a minute
 *   short       a grandchild that detaches itself, loses 17 blocks of 71 bytes and ends after half a second
 *   exit3       exit code 3;  _exit: no handlers;  crash: SIGSEGV
 */
#include "program.h"
#include <signal.h>
#include <sys/wait.h>

static void *held[7], *destroyed[5];
/* Not static: the compiler would see that nobody reads it. */
void *kept;

SITE static void leak_blocks(void)
{
	for (int i = 0; i < 131; i++)
		keep(malloc(13));
}

SITE static void fill_handled(void)
{
	for (int i = 0; i < 7; i++)
		held[i] = keep(malloc(43));
}

static void free_handled(void)
{
	for (int i = 0; i < 7; i++)
		free(held[i]);
}

SITE static void fill_destroyed(void)
{
	for (int i = 0; i < 5; i++)
		destroyed[i] = keep(malloc(59));
}

__attribute__((destructor)) static void destroy(void)
{
	for (int i = 0; i < 5; i++)
		free(destroyed[i]);
}

SITE static void fill_static(void)
{
	kept = keep(malloc(1009));
}

SITE static void leak_in_child(void)
{
	for (int i = 0; i < 11; i++)
		keep(malloc(37));
}

SITE static void leak_in_daemon(void)
{
	for (int i = 0; i < 17; i++)
		keep(malloc(71));
}

static void fork_three(void)
{
	for (int i = 0; i < 3; i++) {
		pid_t child = fork();

		if (child < 0)
			abort();
		if (child == 0) {
			leak_in_child();
			_exit(0);
		}
	}
	while (wait(NULL) > 0)
		;
}

static void vfork_true(void)
{
	pid_t child = vfork();

	if (child < 0)
		abort();
	if (child == 0) {
		execl("/bin/true", "true", (char *)NULL);
		_exit(127);
	}
	waitpid(child, NULL, 0);
}

static void daemonize(unsigned int stays_ms)
{
	pid_t child = fork();

	if (child < 0)
		abort();
	if (child > 0) {
		waitpid(child, NULL, 0);
		return;
	}
	setsid();
	/* As daemons do: whoever reads our output must not wait for it. */
	for (int fd = 0; fd < 3; fd++)
		close(fd);
	if (fork() == 0) {
		leak_in_daemon();
		usleep(stays_ms * 1000);
	}
	_exit(0);
}

static void *run_again(void *arguments)
{
	free(keep(malloc(43)));
	execv("/proc/self/exe", arguments);
	abort();
}

static void exec_from_thread(char **arguments)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, run_again, arguments))
		abort();
	pthread_join(thread, NULL);
	abort();
}

int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		const char *what = argv[i];

		if (!strcmp(what, "leak")) {
			leak_blocks();
		} else if (!strcmp(what, "handler")) {
			fill_handled();
			atexit(free_handled);
		} else if (!strcmp(what, "destructor")) {
			fill_destroyed();
		} else if (!strcmp(what, "static")) {
			fill_static();
		} else if (!strcmp(what, "fork")) {
			fork_three();
		} else if (!strcmp(what, "vfork")) {
			vfork_true();
		} else if (!strcmp(what, "exec")) {
			argv[i] = argv[0];
			execv("/proc/self/exe", argv + i);
			abort();
		} else if (!strcmp(what, "texec")) {
			argv[i] = argv[0];
			exec_from_thread(argv + i);
		} else if (!strcmp(what, "daemon")) {
			daemonize(60 * 1000);
		} else if (!strcmp(what, "short")) {
			daemonize(500);
		} else if (!strcmp(what, "exit3")) {
			return 3;
		} else if (!strcmp(what, "_exit")) {
			_exit(0);
		} else if (!strcmp(what, "crash")) {
			raise(SIGSEGV);
		} else {
			abort();
		}
	}
	return 0;
}
