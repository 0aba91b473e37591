// Package bench compares this library with others on the same work. It is a module of its own, so that
// what it compares with is not among the library's dependencies.
//
//	go -C bench test -bench . -count 5
//
// Each benchmark has one sub-benchmark for each library, run side by side:
//
//	Hot           one key, one goroutine
//	HotParallel   one key, all processors
//	MillionKeys   a million keys in random order, all processors
//	BytesPerKey   memory that a million keys take beside their own 16 bytes, as B/key
//
// All charges are granted, and no key becomes full again, so that every store keeps all keys.
package bench
