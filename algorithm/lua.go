package algorithm

import _ "embed"

// The Lua twins, see driver.Scripted. The Go beside them is the law.
var (
	//go:embed tokenbucket.lua
	tokenBucketLua string
	//go:embed slidingwindow.lua
	slidingWindowLua string
	//go:embed slidinglog.lua
	slidingLogLua string
	//go:embed fixedwindow.lua
	fixedWindowLua string
)

// Lua implements driver.Scripted.
func (*tokenBucket) Lua() string { return tokenBucketLua }

// Lua implements driver.Scripted.
func (*slidingWindow) Lua() string { return slidingWindowLua }

// Lua implements driver.Scripted.
func (*slidingLog) Lua() string { return slidingLogLua }

// Lua implements driver.Scripted.
func (*fixedWindow) Lua() string { return fixedWindowLua }
