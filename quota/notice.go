package quota

// A Notice is something an operator should know about a store or a policy: a dangerous setting, a lost
// or regained store. Who makes a store says who is told; a Notice is delivered outside any lock and may
// be delivered concurrently.
type Notice struct {
	// Name says what kind of notice this is, in a fixed word such as "eviction" or "breaker".
	Name string
	// Text says it in a sentence, with no key and no credential.
	Text string
	// Err is the cause, or nil.
	Err error
}
