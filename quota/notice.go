package quota

// A Notice tells an operator about a store or a policy: a dangerous setting, a lost or regained store. The options of
// stores and policies name the function that receives it. It is called outside any lock, and may be called
// concurrently.
type Notice struct {
	// Name is the kind of notice, a fixed word such as "eviction", "breaker" or "timeout". docs/operating.md has all of them,
	// with their actions; they are stable, so that a program may act by them.
	Name string
	// Text is the message, one sentence without keys and credentials.
	Text string
	// Err is the cause, or nil.
	Err error
}
