package algorithm

import (
	_ "embed"
	"strings"
)

// The same rules in Lua, see driver.Scripted. Where the two differ, the Go is right.
var (
	//go:embed tokenbucket.lua
	tokenBucketLua string
	//go:embed slidingwindow.lua
	slidingWindowLua string
	//go:embed slidinglog.lua
	slidingLogLua string
	//go:embed fixedwindow.lua
	fixedWindowText string
	//go:embed calendar.lua
	calendarText string
	//go:embed inwindow.lua
	inWindowText string
	//go:embed stateless.lua
	statelessLua string
	//go:embed held.lua
	heldLua string
	//go:embed pool.lua
	poolLua string
)

var fixedWindowLua, calendarLua = inWindowLua(fixedWindowText), inWindowLua(calendarText)

// inWindowLua returns the Lua of a rule whose windows have one count, with the part that such rules share.
func inWindowLua(text string) string { return strings.Replace(text, "INWINDOW\n", inWindowText, 1) }

// Lua returns the rule's Lua, see driver.Scripted.
func (*tokenBucket) Lua() string { return tokenBucketLua }

// Lua returns the rule's Lua, see driver.Scripted.
func (*slidingWindow) Lua() string { return slidingWindowLua }

// Lua returns the rule's Lua, see driver.Scripted.
func (*slidingLog) Lua() string { return slidingLogLua }

// Lua returns the rule's Lua, see driver.Scripted.
func (*fixedWindow) Lua() string { return fixedWindowLua }

// Lua returns the rule's Lua, see driver.Scripted.
func (*calendar) Lua() string { return calendarLua }

// Lua returns the rule's Lua, see driver.Scripted.
func (*stateless) Lua() string { return statelessLua }
