// What the doubles of the CUDA driver and of NCCL share: work that is put on a stream of the double.
#pragma once

extern "C" {
// Runs work(argument) on a stream of this library, after what it was given before. A code of the driver.
int double_enqueue(void *stream, void (*work)(void *), void *argument);
// Whether the calling thread has a current context.
int double_has_context();
// Streams, events and memory that were made and not destroyed, and contexts that were retained and not released.
int double_live_handles();
}
