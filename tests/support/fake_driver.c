/* A driver of NVIDIA that has no GPU: what it does is in the environment variable FAKE_DRIVER. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int cuDriverGetVersion(int *version)
{
    const char *what = getenv("FAKE_DRIVER");
    if (!strcmp(what, "hangs"))
        sleep(60);
    if (!strcmp(what, "crashes"))
        abort();
    *version = atoi(what);
    return 0;
}

int nvmlInit_v2(void) { return 0; }

int nvmlSystemGetDriverVersion(char *text, unsigned length)
{
    strncpy(text, "470.57\033[2J", length);
    return 0;
}
