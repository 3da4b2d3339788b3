"""Common English words for the rendered text of the OCR tasks."""

__all__ = ["WORDS"]

_TEXT = """
able about above abroad absence absolute accept access accident account accurate achieve across
act action active actual add address adequate adjust admit adult advance advice affair afford
afraid after again against age agency agent ago agree ahead aid aim air aircraft airport alarm
album alive all allow almost alone along already also alter always amount analysis ancient anger
angle animal announce annual another answer anxiety any apart appeal appear apple apply appoint
approach approve april archive area argue arise arm army around arrange arrive art article artist
aside ask aspect assess asset assist assume assure atmosphere attach attack attempt attend attract
auction audience august author average avoid award aware away awful baby back bacon bad badge bag
bake balance ball banana band bank bar bare barely base basic basin basis basket battle beach bean
bear beat beauty because become bed beef before begin behave behind being belief bell belong below
belt bench bend beneath benefit beside best better between beyond bicycle big bill bind bird birth
biscuit bit bitter black blade blame blanket blind block blood blow blue board boat body boil bold
bomb bond bone bonus book border born borrow boss both bother bottle bottom bounce bound bowl box
boy brain branch brand brass brave bread break breath brick bridge brief bright bring broad broken
brother brown brush bubble bucket budget build bulk bullet bundle burden bureau burn burst bus
business busy butter button buy cabin cabinet cable cake calcium call calm camera camp campaign
canal cancel candle canvas capable capital captain capture carbon card care career carpet carry
cart case cash castle casual cat catch category cattle cause caution cave ceiling cell cement
central century ceremony certain chain chair chalk chamber chance change channel chapter charge
charity chart chase cheap check cheese chemical chest chicken chief child choice choose church
circle citizen city civil claim class classic clean clear clerk clever client climate climb clinic
clock close cloth cloud club coach coal coast coat code coffee coin cold collect college colour
column combine come comfort command comment common company compare compete complain complete
complex compose concept concern concert conclude concrete condition conduct confirm conflict
confuse connect consent consider consist constant construct consult consume contact contain
content contest context continue contract contrast control convert convince cook cool copper copy
core corner correct cost cottage cotton council count country county couple courage course court
cousin cover cow crack craft crash cream create credit crew crime crisis critical crop cross crowd
crown cruel crush cry crystal culture cup cupboard cure curious current curtain curve custom cut
cycle daily dairy damage damp dance danger dark data date daughter dawn day deal dear death debate
debt decade decent decide deck declare decline deep deer defeat defend define degree delay
delicate deliver demand deny depart depend deposit depth deputy derive describe desert design
desire desk despite destroy detail detect develop device devote diagram dialogue diamond diary
diet differ digital dinner direct dirt disc discount discover discuss disease dish display
distance district disturb divide doctor document dog dollar domain door dose double doubt down
dozen draft drag drama draw dream dress drift drink drive drop drum dry duck due dull during dust
duty each eager ear early earn earth ease east easy eat echo economy edge edit editor educate
effect effort egg eight either elbow elect electric elegant element elephant eleven else embrace
emerge emotion emphasis employ empty enable encounter end enemy energy engage engine enhance enjoy
enormous enough ensure enter entire entry envelope equal equip error escape especially essay
essence estate estimate ethics even evening event ever every evidence evil exact examine example
exceed excellent except exchange excite exclude excuse exercise exhibit exist exit expand expect
expense expert explain explore export expose express extend extent extra extreme eye fabric face
facility fact factor factory fade fail fair faith fall false fame family famous fan fancy far farm
fashion fast fat fate father fault favour fear feature february federal fee feed feel fellow
female fence festival fetch fever few field fierce fifteen fifty fight figure file fill film
filter final finance find fine finger finish fire firm first fish fit five fix flag flame flash
flat flavour fleet flesh flight float flood floor flour flow flower fluid fly focus fold folk
follow food foot force foreign forest forever forget form formal format former fortune forty
forward found four frame frank free freedom freeze frequent fresh friday friend front frost frown
fruit fuel full fun function fund funny fur furnish further future gain galaxy gallery game gap
garage garden garlic gas gate gather gear general generate genius gentle genuine gesture get giant
gift girl give glad glance glass global gloom glory glove goal goat god gold golf good govern grab
grace grade gradual grain grand grant grape graph grass grave gravity gray great green greet grey
grief grocery gross ground group grow growth guard guess guest guide guilt guitar gun habit hair
half hall hammer hand handle hang happen happy harbour hard harm harvest hat hate have hawk head
health heap hear heart heat heaven heavy hedge height help hence herb here hero hesitate hidden
hide high highway hill hint hire history hobby hold hole holiday hollow holy home honest honey
honour hook hope horizon horn horror horse hospital host hot hotel hour house hover however huge
human humble humour hundred hunger hunt hurry hurt husband ice idea ideal identify idle ignore ill
image imagine impact imply import impose impress improve inch incident include income increase
indeed index indicate indoor industry infant inflation inform initial injury ink inner innocent
input inquiry insect insert inside insist inspect inspire install instance instead insult insure
intend intense interest interior internal interval into invent invest invite involve iron island
issue item ivory jacket jail january jazz jealous jeans jelly jewel job join joint joke journal
journey joy judge juice july jump june jungle junior jury just justice keen keep kettle key kick
kid kidney kill kind king kingdom kiss kit kitchen knee knife knock knot know label labour lack
ladder lady lake lamb lamp land lane language large laser last late later laugh launch laundry law
lawn lawyer lay layer lazy lead leaf league leak lean learn leather leave lecture left leg legal
legend leisure lemon lend length lens less lesson letter level liberal library licence lie life
lift light like limb limit line link lion lip liquid list listen literary little live liver load
loan local locate lock logic lonely long look loop loose lord lorry lose loss lot loud lounge love
lovely low loyal luck lumber lunch lung luxury machine mad magazine magic magnet mail main
maintain major make male manage manner manual many map marble march margin marine mark market
marriage mask mass master match mate material matter mature maximum maybe mayor meadow meal mean
measure meat medal media medical medium meet melody melt member memory mental mention menu mercy
mere merit merry mess message metal method middle midnight might mild mile military milk mill
million mind mine mineral minimum minister minor minute miracle mirror miss mission mist mistake
mix mobile mode model modern modest modify moment monday money monitor monkey month mood moon
moral morning mortgage motion motive motor mount mountain mouse mouth move movie much mud multiple
murder muscle museum mushroom music mutual mystery myth nail naked name narrow nation native
natural near neat neck need needle negative neglect neighbour neither nephew nerve nest net
network neutral never new news next nice night nine noble nobody noise none noon normal north nose
note nothing notice notion novel november nuclear number nurse nut oak obey object oblige observe
obtain obvious occasion occupy occur ocean october odd offend offer office often oil old olive
once onion only onto open opera operate opinion oppose option oral orange orbit order ordinary
organ origin other ought outcome outdoor output outside oven over overall owe own owner oxygen
pace pack package page pain paint pair palace pale palm pan panel panic paper parade parcel pardon
parent park parliament part partly party pass passage past paste patch path patient pattern pause
pay peace peak pear peasant pen pencil penny people pepper per perceive percent perfect perform
perhaps period permit person phase phone photo phrase physical piano pick picnic picture piece pig
pile pilot pin pine pink pint pioneer pipe pitch place plain plan plane planet plant plastic plate
platform play plead please plenty plot plough plug plus pocket poem poet point poison pole police
policy polite poll pond pool poor popular port portion portrait pose position possess possible
post potato pound pour poverty powder power practice praise pray precise predict prefer prepare
presence present preserve press pretend pretty prevent previous price pride priest primary prime
prince print prior prison private prize probable problem proceed process produce profit program
progress project promise promote prompt proof proper propose protect protein protest proud prove
provide public publish pull pulse pump punch punish pupil purchase pure purple purpose purse
pursue push put puzzle qualify quality quarter queen query quest question queue quick quiet quilt
quit quite quote rabbit race radar radical radio rail rain raise random range rank rapid rare rate
rather ratio raw ray reach react read ready real reason rebel recall receipt receive recent recipe
record recover red reduce refer reflect reform refuse regard region regret regular reject relate
relax release relief rely remain remark remedy remember remind remote remove rent repair repeat
replace reply report request require rescue research reserve resident resist resolve resort
resource respect respond rest result retail retain retire retreat return reveal revenue reverse
review revise reward rhythm rice rich ride right rigid ring ripe rise risk rival river road roast
rob robot rock rocket role roll romance roof room root rope rose rough round route routine row
royal rub rubber rubbish rude ruin rule rumour run rural rush sacred sad safe safety sail saint
sake salad salary sale salt same sample sand satellite satisfy saturday sauce sausage save say
scale scan scare scatter scene schedule scheme school science scope score scratch screen screw
script sea search season seat second secret section sector secure see seed seek seem select self
sell senate send senior sense sentence separate september sequence series serious serve session
set settle seven several severe shade shadow shake shall shallow shame shape share sharp sheep
sheet shelf shell shelter shield shift shine ship shirt shock shoe shoot shop shore short should
shoulder shout show shower shrug shut shy sick side sigh sight sign signal silence silk silly
silver similar simple since sing single sink sir sister site situation six sixty size sketch skill
skin skirt sky slave sleep sleeve slice slide slight slim slip slope slow small smart smell smile
smoke smooth snake snap snow soap soccer social society sock soft software soil solar soldier sole
solid solution solve some son song soon sorry sort soul sound soup source south space spare speak
special species speech speed spell spend sphere spider spin spirit spite split spoil sponsor spoon
sport spot spread spring square squeeze stable staff stage stair stake stamp stand standard star
stare start state station statue status stay steady steal steam steel steep stem step stick stiff
still stir stock stomach stone stop store storm story stove straight strain strange stream street
stress stretch strict strike string strip stroke strong structure struggle student studio study
stuff stupid style subject submit substance suburb succeed such sudden suffer sugar suggest suit
sum summer summit sun sunday supper supply support suppose sure surface surgery surprise surround
survey survive suspect suspend sustain swallow swear sweat sweep sweet swim swing switch symbol
symptom system table tackle tail take tale talent talk tall tank tape target task taste tax taxi
tea teach team tear technique teenage telephone tell temper temple ten tenant tend tennis tension
tent term terrible test text thank theatre theme then theory there thick thief thin thing think
third thirty thorough though thought thread threat three throat through throw thumb thunder
thursday ticket tide tidy tie tiger tight timber time tin tiny tip tired tissue title toast
tobacco today toe together toilet tomato tomorrow tone tongue tonight tool tooth top topic torch
total touch tough tour toward towel tower town toy trace track trade traffic train transfer
transport trap travel tray treasure treat treaty tree tremble trend trial tribe trick trigger trip
troop tropical trouble truck true trumpet trunk trust truth try tube tuesday tune tunnel turkey
turn twelve twenty twice twin twist two type tyre ugly ultimate umbrella unable uncle under
undergo uniform union unique unit unite unity universe unless until update upon upper upset urban
urge urgent use useful usual utility vacant vague valid valley value van vanish variety vary vast
vegetable vehicle venture verb version versus vessel veteran via victim victory video view village
violent virtue virus visible vision visit visual vital vitamin vivid vocal voice volume vote
voyage wage wagon waist wait wake walk wall wander want war warm warn wash waste watch water wave
way weak wealth weapon wear weather web wedding wednesday week weekend weigh welcome welfare well
west wet whale wheat wheel when where whether which while whip whisper whistle white whole wide
widow width wife wild will willing win wind window wine wing winner winter wipe wire wise wish
within without witness wolf woman wonder wood wool word work world worm worry worth wound wrap
wrist write wrong yacht yard year yellow yesterday yet yield young youth zebra zero zinc zone zoom
"""

WORDS: tuple[str, ...] = tuple(_TEXT.split())
